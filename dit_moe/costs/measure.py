"""How fast this machine's CPU trains a model: a few passes of one like it, on noise, are timed."""

from __future__ import annotations

import time
from typing import Any

import torch

from dit_moe.models import MODELS, LMConfig

PASSES, SECONDS = 4, 1.0  # at most so many, and no other is begun after so long
ROUGHLY = 2e10  # FLOPs of one pass, which decide how many rows are in it
LARGEST = 5e11  # FLOPs of the pass of one row that is still timed


def flops_per_second(experiment: Any, flops_per_row: float, precision: str) -> float | None:
    """Forward and backward passes in `precision`; None for a model that is too large to be timed in passing.

    Args:
        experiment: resolved.
        flops_per_row: of one row in training.
    """
    model, train = experiment.model, experiment.train
    if flops_per_row > LARGEST:
        return None
    rows = min(train.micro_batch or train.batch_size, max(1, int(ROUGHLY / flops_per_row)))
    with torch.random.fork_rng(devices=[]):
        network, inputs = MODELS.build(model).train(), _noise(model, rows)
    seconds: list[float] = []
    begun = time.perf_counter()
    while len(seconds) < PASSES and time.perf_counter() - begun < SECONDS:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = network(*inputs).float().square().mean()
        loss.backward()
        seconds.append(time.perf_counter() - start)
    return rows * flops_per_row / min(seconds)


def _noise(model: Any, rows: int) -> tuple[torch.Tensor, ...]:
    if isinstance(model, LMConfig):
        return (torch.randint(model.need("vocab_size"), (rows, model.tokens)),)
    latents = torch.randn(rows, model.in_channels, model.input_size, model.input_size)
    return latents, torch.rand(rows), torch.randint(model.num_classes, (rows,))
