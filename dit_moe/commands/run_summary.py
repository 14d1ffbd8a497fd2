"""What a finished run tells of its training, from the lines of its log."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dit_moe.moe import MoEConfig


def active_experts(log: Sequence[dict[str, Any]], moe: MoEConfig | None) -> dict[str, float] | None:
    """Target, and mean and std over the logged steps of the last quarter of training; None for a dense model."""
    if moe is None:
        return None
    last = [line["active"] for line in log if line["step"] > 0.75 * log[-1]["step"]]
    return {"target": moe.target, "mean": statistics.fmean(last), "std": statistics.pstdev(last)}


def train_seconds(log: Sequence[dict[str, Any]], unit: str) -> float:
    """Time spent in training steps over all starts of the run, without checkpoints and samples.

    `unit` is what the log counts.
    """
    counts = [0, *[line[unit] for line in log]]
    return sum(
        (after - before) / line[f"{unit}_per_s"] for before, after, line in zip(counts, counts[1:], log, strict=False)
    )


def training_rows(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows of a table: what the two functions above found, under their names in `metrics`."""
    if active := metrics["active_experts"]:
        shown = f"{active['mean']:.3f} ± {active['std']:.3f} over the last quarter, target {active['target']:g}"
        yield "active experts per token", shown
    yield "training", f"{metrics['train_seconds']:.0f} s"
