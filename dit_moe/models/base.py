"""What every family of models has in common: the registry, and the prediction of its size and cost."""

from __future__ import annotations

from dataclasses import dataclass

from dit_moe.registry import Registry

MODELS = Registry("model")


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Size and cost of a model, predicted from its config without building it."""

    total_params: int
    active_params: float  # parameters that a token meets on average when the routers are at their target
    forward_flops: float  # of one sample at the target; a multiply-add counts 2
