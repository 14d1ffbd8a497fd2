"""Rows of a table that tell of a finished run's training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dit_moe.rounding import rounded


def training_rows(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows of a table, from `metrics` that hold what the functions of `training.summary` found, under their names."""
    if active := metrics["active_experts"]:
        shown = f"{active['mean']:.3f} ± {rounded(active['std'], 3)} over the last quarter, target {active['target']:g}"
        yield "active experts per token", shown
    yield "training", f"{rounded(metrics['train_seconds'], 0)} s"
