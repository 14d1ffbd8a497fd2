"""DSMoE (of EfficientMoE): fine SwiGLU experts as in DeepSeek-V3, in every second block, and 2-D rotary positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_moe.config import Tree
from dit_moe.formats.base import Found, ImageFormat, register, stable_diffusion_autoencoder
from dit_moe.formats.dit import block_rules, outer_shape
from dit_moe.formats.moe_blocks import KINDS, expert_blocks, gated_experts, shape_of, trunk_rules
from dit_moe.formats.rules import Rule, beside_constant

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width, in every published model
ACTIVE = {16: (2, 2.0), 48: (5, 2.5)}  # by the number of experts: active ones of a token, and the sum of their gates
INPUT_SIZE = 32  # of every published model; weights with rotary positions do not tell it


@register("dsmoe")
class DSMoEFormat(ImageFormat):
    """Checkpoints trained by its rectified flow, whose time ends at the data.

    Without a position embedding they are read as with 2-D rotary positions; those of its ablation with 1-D ones have
    the same tensors and would be read wrongly.
    """

    suite: ClassVar[str] = "DSMoE"
    recipe: ClassVar[str | None] = "dsmoe"
    assumed: ClassVar[tuple[str, ...]] = ("model.input_size", "model.moe.target", "model.moe.router.gate_scale")

    def model(self, found: Found) -> Tree:
        blocks = expert_blocks(found, "mlp.gate.weight")
        place = f"blocks.{blocks['offset']}.mlp"
        experts, width = found.matrix(f"{place}.gate.weight")
        target, scale = ACTIVE.get(experts, (None, 2.0))  # without a target it is asked for
        moe = {
            "experts": experts,
            **({} if target is None else {"target": target}),
            "expert_hidden": found.matrix(f"{place}.experts.blocks.0.gate_proj.weight")[0],
            "shared_experts": 1,
            "shared_hidden": found.matrix(f"{place}.shared_experts.gate_proj.weight")[0],
            "activation": "swiglu",
            "router": {"name": "dsmoe", "gate_scale": scale},
            **blocks,
        }
        rotary = {} if "pos_embed" in found.tensors else {"position_embedding": "rotary"}
        shape = {**shape_of(found, HEADS.get(width)), **outer_shape(found, INPUT_SIZE if rotary else None)}
        return {**shape, "activation": "silu", **rotary, "moe": moe}

    def objective(self, found: Found) -> Tree:
        return {"name": "flow", "direction": "to_data", "time_scale": 1.0}

    def first_stage(self, found: Found) -> Tree:
        return stable_diffusion_autoencoder("mse")

    def rules(self, model: Any) -> Sequence[Rule]:
        weight, bias = "blocks.#.mlp.gate.weight", "blocks.#.mlp.gate.e_score_correction_bias"
        router = beside_constant("blocks.#.moe.router.weight", weight, bias, 0.0)
        rules = [router, *gated_experts("mlp.experts.blocks.*", "mlp.shared_experts")]
        if not model.has_rotary:
            return [*trunk_rules(model), *rules]
        qkv = [rotary_rule(f"blocks.#.attn.qkv.{kind}", model.need("heads")) for kind in KINDS]
        return [*trunk_rules(model, [*qkv, *block_rules("attn.proj")]), *rules]


def rotary_rule(name: str, heads: int) -> Rule:
    """Queries, keys and values whose rotary pairs lie a quarter of a head apart; ours lie side by side."""

    def reordered(qkv: Tensor, *pairs: int) -> list[Tensor]:
        q, k, v = qkv.chunk(3)
        q, k = (each.unflatten(0, (heads, 2, *pairs)).transpose(2, 3).flatten(0, 3) for each in (q, k))
        return [torch.cat([q, k, v])]

    return Rule((name,), (name,), lambda theirs: reordered(theirs[0], 2, -1), lambda ours: reordered(ours[0], -1, 2))
