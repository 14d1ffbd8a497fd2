"""Thresholds of a language model solved for another number of experts, on tokens that it was trained on."""

# B rows of a batch, S tokens the model sees

from __future__ import annotations

from typing import Literal

import torch

from dit_moe.models import LM
from dit_moe.moe.compute_budget import ComputeBudget
from dit_moe.text.sequences import TokenSequences

ROWS, BATCH = 128, 16


def read_some(
    model: LM,
    dataset: TokenSequences,
    budget: ComputeBudget,
    precision: Literal["fp32", "bf16"] = "fp32",
    rows: int = ROWS,
) -> None:
    """Let the model, with a compute budget, see rows from all over the data: what `solve_budget` solves on.

    Always the same ones, so that the solution depends on nothing else.
    """
    device, count = next(model.parameters()).device, min(rows, len(dataset))
    chosen = [number * len(dataset) // count for number in range(count)]
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
    with torch.no_grad(), budget.at(), autocast:
        for start in range(0, count, BATCH):
            batch = dataset.__getitems__(chosen[start : start + BATCH])
            seen_BS = [each[:, :-1].to(device) for each in batch.values()]  # tokens, and documents if they are told
            model(*seen_BS, states=True)
