"""Study of the PI controller's gains in closed loop with synthetic routers: where the defaults come from.

Each token's logits are standardised, scaled by a θ that grows during the run (routers sharpen as they learn), and
selected with the controller's threshold; the mean over the tokens of a "batch" is what the controller sees. Tokens of
one image share part of their logits' sharpness, so that a batch of few images is as noisy as in training.

Prints one JSON line per (law, experts, target): the worst over starts p_0 ∈ {0.05, 0.5, 0.95} of
  settle     steps until the mean stays within 5 % of the target (running mean of 10 steps, so noise does not count)
  overshoot  largest excess over the target after the first crossing, in % of the target
  error      |mean − target| over the last quarter, in % (the lag behind the sharpening)
  std        std of the mean over the last quarter, in experts
and, for reference, `noise`: the std that a perfectly placed constant p would show.

    python -m benchmarks.controller [--images 128] [--laws paper,0.1,0.3 scheduled,0.2,0.3 …] [--sharpen 2]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import torch

from dit_moe.moe.routers.dtopp import ControllerConfig, PIController
from dit_moe.moe.routing import mass_left, prefix_mask

SHAPES = [(4, 1.5), (4, 3.0), (8, 2.0), (16, 2.0), (16, 8.0), (64, 1.5), (64, 8.0), (128, 16.0)]
LAWS = "paper,0.5,0.05 paper,0.1,0.3 scheduled,0.1,0.2 scheduled,0.2,0.3 scheduled,0.2,0.5 scheduled,0.3,0.5"


def batch_mass(generator: torch.Generator, images: int, tokens: int, experts: int, theta: float) -> tuple:
    logits = torch.randn(images, tokens, experts, generator=generator)
    spread = 1 + 0.3 * torch.randn(images, 1, 1, generator=generator)  # an image's own sharpness
    logits = (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True, correction=0)
    return mass_left((theta * spread * logits).flatten(0, 1).softmax(-1))


def run(law: ControllerConfig, experts: int, target: float, p0: float, images: int, steps: int, sharpen: float) -> dict:
    generator = torch.Generator().manual_seed(experts)
    controller = PIController(replace(law, p0=p0), target, experts)
    active, constant = [], []
    for step in range(steps):
        left, order = batch_mass(generator, images, 16, experts, theta=1 + (sharpen - 1) * step / steps)
        active.append(prefix_mask(left, order, tail=controller.tail).sum(-1, dtype=torch.float64).mean().item())
        slope = controller.slope(left) / len(left)
        if step == 3 * steps // 4:
            frozen = controller.tail.clone()
        if step >= 3 * steps // 4:
            constant.append(prefix_mask(left, order, tail=frozen).sum(-1, dtype=torch.float64).mean().item())
        controller.step(torch.tensor(active[-1]), slope)
    history = torch.tensor(active, dtype=torch.float64)
    smooth = history.unfold(0, 10, 1).mean(-1)
    outside = ((smooth - target).abs() > 0.05 * target).nonzero()
    sign = 1 if history[0] < target else -1
    crossed = (sign * (history - target) > 0).nonzero()
    after = sign * (history[crossed[0] :] - target) if len(crossed) else torch.zeros(1)
    last = history[3 * steps // 4 :]
    frozen_history = torch.tensor(constant, dtype=torch.float64)
    slope = torch.linspace(-1, 1, len(frozen_history), dtype=torch.float64)  # the drift is not noise
    residual = frozen_history - frozen_history.mean() - slope * (frozen_history * slope).sum() / slope.square().sum()
    return {
        "settle": int(outside.max()) + 1 if len(outside) else 0,
        "overshoot": 100 * after.max().clamp(min=0).item() / target,
        "error": 100 * abs(last.mean().item() - target) / target,
        "std": last.std().item(),
        "noise": residual.std().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128, help="images of 16 tokens in a batch")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sharpen", type=float, default=2.0, help="θ at the end of the run; it starts at 1")
    parser.add_argument("--laws", nargs="+", default=LAWS.split(), metavar="LAW,KP,KI")
    args = parser.parse_args()
    for text in args.laws:
        name, kp, ki = text.split(",")
        law = ControllerConfig(law=name, kp=float(kp), ki=float(ki), anti_windup=True)
        for experts, target in SHAPES:
            runs = [run(law, experts, target, p0, args.images, args.steps, args.sharpen) for p0 in (0.05, 0.5, 0.95)]
            worst = {key: round(max(result[key] for result in runs), 3) for key in runs[0]}
            print(
                json.dumps({"law": text, "experts": experts, "target": target, "images": args.images} | worst),
                flush=True,
            )


if __name__ == "__main__":
    main()
