"""A whole training step of models with experts against that of a dense one of the same active FLOPs.

    python -m benchmarks.train_step [--models DiT-S/2,DiT-S/2-8E2A,DiT-S/2-64E8A] [--batch 8] [--router dtopp]
                                    [--compile] [--device cuda] [--dtypes fp32,bf16] [--turns 7]

Latents are 4×32×32. Prints a JSON line for each dtype: milliseconds of the first model's step, how many times as long
the others' take, and images per second; of each model the share of the step that its routers' thresholds and statistics
take after the gradients (`update_share`).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks._timing import DTYPES, add_machine_arguments, show, take_turns, wait_for
from dit_moe.diffusion import OBJECTIVES
from dit_moe.models import MODELS
from dit_moe.moe import MoEConfig, update_routers
from dit_moe.moe.routers import ROUTERS
from dit_moe.randomness import BatchRandom
from dit_moe.training import TrainConfig, TrainingStep
from dit_moe.training.devices import build_accelerator
from dit_moe.training.step import MicroBatch

CLASSES, SIDE, CHANNELS = 1000, 32, 4


def build(name: str, router: str, batch: int, dtype: str, compiled: bool) -> tuple[TrainingStep, Callable[[], object]]:
    """What trains the model, and its step on a batch of noise."""
    config_class = MODELS.config_class("DiT")
    sizes = {"in_channels": CHANNELS, "input_size": SIDE, "num_classes": CLASSES, "learn_sigma": False}
    moe = MoEConfig(router=ROUTERS.config_class(router)()) if "E" in name.partition("-")[2].partition("-")[2] else None
    torch.manual_seed(0)
    model = MODELS.build(config_class(name=name, moe=moe, **sizes))
    for (
        parameter
    ) in model.parameters():  # as after some training: else the blocks add nothing, and experts learn nothing
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    train = TrainConfig(batch_size=batch, mixed_precision=dtype, compile=compiled)
    accelerator = build_accelerator(train, Path(tempfile.gettempdir()))
    objective = OBJECTIVES.build(OBJECTIVES.config_class("flow")(), num_classes=CLASSES)
    step = TrainingStep(train, accelerator, model, objective)
    device = accelerator.device
    batch_of = {
        "latents": torch.randn(batch, CHANNELS, SIDE, SIDE, device=device),
        "labels": torch.randint(CLASSES, (batch,), device=device),
    }
    micro = [MicroBatch(batch=batch_of, random=lambda: BatchRandom(0, total=batch, device=device), share=1.0)]
    step.calibrate(micro)
    return step, lambda: step(1, micro)


def measure(names: list[str], router: str, batch: int, dtype: str, compiled: bool, turns: int) -> None:
    built = {name: build(name, router, batch, dtype, compiled) for name in names}
    device = next(iter(built.values()))[0].accelerator.device
    seconds = take_turns({name: call for name, (_, call) in built.items()}, turns, device)
    first = names[0]
    facts: dict[str, Any] = {"baseline": first, "baseline_ms": 1e3 * seconds[first]}
    facts["images_per_s"] = {name: float(f"{batch / each:.4g}") for name, each in seconds.items()}
    facts["times_baseline"] = {name: float(f"{seconds[name] / seconds[first]:.4g}") for name in names[1:]}
    facts["update_share"] = {
        name: float(f"{_update_seconds(step, turns, device) / seconds[name]:.2g}") for name, (step, _) in built.items()
    }
    show("train_step", device, batch=batch, router=router, dtype=dtype, compiled=compiled, **facts)


def _update_seconds(step: TrainingStep, turns: int, device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    for _ in range(turns):
        update_routers(step.model, report=False)
    wait_for(device)
    return (time.perf_counter() - start) / turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="DiT-S/2,DiT-S/2-8E2A,DiT-S/2-64E8A")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--router", default="dtopp")
    parser.add_argument("--compile", action="store_true")
    add_machine_arguments(parser)
    args = parser.parse_args()
    for dtype in args.dtypes.split(","):
        assert dtype in DTYPES, dtype
        measure(args.models.split(","), args.router, args.batch, dtype, args.compile, args.turns)


if __name__ == "__main__":
    main()
