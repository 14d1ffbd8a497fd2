"""What the trainer needs of an experiment, beside its model: the half of `dit-moe train` that differs by its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dit_moe.training import Hook, Unit
from dit_moe.training.data_loader import Prepare
from dit_moe.training.loss import Objective


@dataclass(frozen=True, kw_only=True)
class TrainingParts:
    """The arguments of `Trainer` that come by these names."""

    objective: Objective
    prepare_batch: Prepare
    facts: Mapping[str, Any]
    hooks: Sequence[Hook]
    unit: Unit
