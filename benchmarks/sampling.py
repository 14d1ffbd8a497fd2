"""Guided sampling with our DiT beside diffusers' transformer and scheduler, with the same weights, steps and dtype.

    python -m benchmarks.sampling [--model DiT-S/2] [--images 4] [--steps 4] [--device cuda] [--dtypes fp32,bf16]
                                  [--turns 7]

Latents are 4×32×32 and weights random; both take DDIM steps with classifier-free guidance, and nothing is decoded.
Prints a JSON line for each dtype: images per second of both, how many times as fast ours is, and how far the networks'
outputs are apart relative to their size.
"""

from __future__ import annotations

import argparse
from typing import Any

import diffusers
import torch
from torch import Tensor

from benchmarks._timing import DTYPES, add_machine_arguments, show, take_turns
from dit_moe.diffusion import OBJECTIVES, SAMPLERS, GuidanceConfig
from dit_moe.formats import FORMATS
from dit_moe.formats.rules import to_ours
from dit_moe.models import MODELS, DiTConfig

CLASSES, CHANNELS, SIDE, SCALE = 1000, 4, 32, 4.0


def theirs_of(config: DiTConfig) -> Any:
    width, heads = config.need("width"), config.need("heads")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=config.need("depth"),
        sample_size=SIDE,
        patch_size=config.need("patch_size"),
        num_embeds_ada_norm=CLASSES,
    )
    for block in model.transformer_blocks:  # trained models hold copies of one embedding
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.eval()


def measure(name: str, images: int, steps: int, dtype: str, device: torch.device, turns: int) -> None:
    sizes = {"in_channels": CHANNELS, "input_size": SIDE, "num_classes": CLASSES, "learn_sigma": True}
    config = DiTConfig(name=name, freq_shift=1, mlp_norm_eps=1e-5, **sizes)  # type: ignore[arg-type]
    theirs, ours = theirs_of(config), MODELS.build(config).eval()
    format_: Any = FORMATS.config_class("diffusers")()
    ours.load_state_dict(to_ours(format_.rules(config), ours.state_dict(), theirs.state_dict(), format_.ignored))
    theirs, ours = theirs.to(device), ours.to(device)
    noise = torch.randn(images, CHANNELS, SIDE, SIDE, device=device)
    labels = torch.randint(CLASSES, (images,), device=device)
    generators = [torch.Generator(device) for _ in range(images)]  # of which DDIM draws nothing
    objective = OBJECTIVES.build(OBJECTIVES.config_class("ddpm")(variance="learned_range"), num_classes=CLASSES)
    sampler = SAMPLERS.build(SAMPLERS.config_class("ddim")(steps=steps), objective)
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False)
    scheduler.set_timesteps(steps)

    def sample_ours() -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, DTYPES[dtype], enabled=dtype == "bf16"):
            return sampler(ours, noise, labels, generators, GuidanceConfig(scale=SCALE))

    def sample_theirs() -> Tensor:
        x, both = noise, torch.cat([labels, torch.full_like(labels, CLASSES)])
        with torch.no_grad(), torch.autocast(device.type, DTYPES[dtype], enabled=dtype == "bf16"):
            for t in scheduler.timesteps:
                out = theirs(torch.cat([x, x]), t.to(device).expand(2 * images), class_labels=both).sample
                conditional, unconditional = out[:, :CHANNELS].chunk(2)
                x = scheduler.step(unconditional + SCALE * (conditional - unconditional), t, x).prev_sample
        return x

    t = torch.full((images,), 500, device=device)
    with torch.no_grad():
        output = theirs(noise, t, class_labels=labels).sample
        apart = (ours(noise, t, labels) - output).norm() / output.norm()
    seconds = take_turns({"ours": sample_ours, "diffusers": sample_theirs}, turns, device)
    facts = {f"{each}_images_per_s": images / passed for each, passed in seconds.items()}
    ratio = seconds["diffusers"] / seconds["ours"]
    shape = {"model": name, "images": images, "steps": steps, "dtype": dtype}
    show("sampling", device, **shape, **facts, times_as_fast=ratio, apart=apart.item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-S/2")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    add_machine_arguments(parser)
    args = parser.parse_args()
    for dtype in args.dtypes.split(","):
        measure(args.model, args.images, args.steps, dtype, torch.device(args.device), args.turns)


if __name__ == "__main__":
    main()
