"""What a forward pass costs with the experts that were really used, which a router without control decides itself."""

from __future__ import annotations

from dit_moe.models.base import TransformerConfig


def forward_flops_at(model: TransformerConfig, active: float | None) -> float:
    """FLOPs of one sample, an image or a sequence, when a token uses `active` routed experts in the mean of MoE layers.

    The target still decides how wide an expert is. A multiply-add counts 2, as in `Footprint.forward_flops`; divide by
    ``model.tokens`` for those of a token.

    Args:
        model: resolved, with the fields that follow from the data.
        active: measured; None for a model without experts, and for no other.

    Raises ValueError for a mean that the model cannot have.
    """
    flops, moe = model.footprint().forward_flops, model.moe
    if moe is None or active is None:
        if moe is not None or active is not None:
            raise ValueError(f"active={active} of a model {'without' if moe is None else 'with'} experts")
        return flops
    if not 0 <= active <= moe.experts:
        raise ValueError(f"active={active:g} must lie in [0, {moe.experts}], the number of experts")
    return flops + 2 * model.tokens * (active / moe.target - 1) * model.expert_weights().active
