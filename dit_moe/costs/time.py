"""FLOPs of training, how long GPUs take for them, and what a family says about its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dit_moe.rounding import rounded
from dit_moe.training import Unit

UNITS = (("days", 86_400), ("hours", 3600), ("minutes", 60), ("seconds", 1))


@dataclass(frozen=True)
class Work:
    """What a run of some family computes, in its own words."""

    rows: str  # what the rows of a batch are called
    unit: Unit  # what its work is counted in
    flops: Sequence[str]  # lines
    generation: float = 0  # FLOPs of all that the section `sample` makes
    generated: str = ""  # … and what that is
    left_out: Sequence[str] = ()  # lines on what the others do not count


def training_flops(experiment: Any) -> float:
    """Of one row in training, activations computed twice where the config says so."""
    passes = 4 if experiment.model.recompute else 3  # a backward pass costs two forward ones
    return passes * experiment.model.footprint().forward_flops


def duration(seconds: float) -> str:
    unit, length = next((each for each in UNITS if seconds >= 2 * each[1]), UNITS[-1])
    return f"{rounded(seconds / length, 1)} {unit}"
