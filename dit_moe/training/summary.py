"""What a run's log tells of its training as a whole."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dit_moe.moe import MoEConfig


def active_experts(log: Sequence[Mapping[str, Any]], moe: MoEConfig | None) -> dict[str, float] | None:
    """Target, and mean and std over the logged steps of the last quarter; None for a dense model, or without a log."""
    if moe is None or not log:
        return None
    last = [line["active"] for line in log if line["step"] > 0.75 * log[-1]["step"]]
    return {"target": moe.target, "mean": statistics.fmean(last), "std": statistics.pstdev(last)}


def train_seconds(log: Sequence[Mapping[str, Any]], unit: str) -> float:
    """Time spent in training steps over all starts of the run, without checkpoints and samples.

    `unit` is what the log counts.
    """
    counts = [0, *[line[unit] for line in log]]
    return sum(
        (after - before) / line[f"{unit}_per_s"] for before, after, line in zip(counts, counts[1:], log, strict=False)
    )
