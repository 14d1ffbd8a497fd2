"""What the formats of DiTs with experts share: which blocks have them, and the layouts in which they keep them."""

# E experts

from __future__ import annotations

from collections.abc import Sequence

import torch

from dit_moe.config import Tree
from dit_moe.formats.base import Found, NotThisFormat, named_size
from dit_moe.formats.dit import DENSE, OUTSIDE, block_rules
from dit_moe.formats.rules import Rule, constant, experts, joined, same
from dit_moe.models import DiTConfig
from dit_moe.moe import MoEConfig

KINDS = ("weight", "bias")


def expert_blocks(found: Found, tensor: str) -> Tree:
    """`every` and `offset` of the blocks that have `tensor`; NotThisFormat if there is none, or no such pair."""
    depth = found.count("blocks.#.")
    blocks = [block for block in range(depth) if f"blocks.{block}.{tensor}" in found.tensors]
    if not blocks:
        raise NotThisFormat(f"no block has a tensor {tensor}")
    every = blocks[1] - blocks[0] if len(blocks) > 1 else depth
    if blocks != list(range(blocks[0], depth, every)):
        raise NotThisFormat(f"the blocks {blocks} have experts, which every and offset cannot say")
    return {"every": every, "offset": blocks[0]}


def shape_of(found: Found, heads: int | None = None, qk_norm_eps: float = 1e-5) -> Tree:
    """Name, or depth, width, heads and hidden width, of a DiT of which some blocks may have experts.

    Args:
        heads: None if they are not known but by the size; where queries and keys are normalised the norm tells them.
        qk_norm_eps: of a LayerNorm on queries and keys, if there is one.
    """
    width, _, patch, _ = found.matrix("x_embedder.proj.weight", 4)
    depth, qk_norm = found.count("blocks.#."), {}
    if "blocks.0.attn.q_norm.weight" in found.tensors:
        heads = width // found.shape("blocks.0.attn.q_norm.weight")[0]
        qk_norm = {"qk_norm": "layer_norm", "qk_norm_eps": qk_norm_eps}
    dense = [name for block in range(depth) if (name := f"blocks.{block}.mlp.fc1.weight") in found.tensors]
    hidden = found.matrix(dense[0])[0] if dense else 4 * width
    return {**named_size(depth, width, hidden, patch, heads), **qk_norm}


def trunk_rules(model: DiTConfig, attention: Sequence[Rule] = ()) -> list[Rule]:
    """Of everything but experts and their routers' own; `attention` where its two layers are not as in DiT."""
    rules = [*map(same, OUTSIDE), *(attention or block_rules("attn.qkv", "attn.proj"))]
    rules += block_rules("attn.q_norm", "attn.k_norm", "adaLN_modulation.1", *DENSE)
    return rules if model.moe is None else [*rules, initial_load(model.moe)]


def initial_load(moe: MoEConfig) -> Rule:
    """Of a router's last load, which only ours keep: even."""
    load_E = torch.full((moe.experts,), 1 / moe.experts)
    return constant("blocks.#.moe.router.load_E", load_E.clone)


def plain_experts(first: str, second: str, routed: str = "mlp.experts.*", shared: str | None = None) -> list[Rule]:
    """Experts of two layers with biases, called `first` and `second`."""
    rules = []
    for ours, theirs in (("in", first), ("out", second)):
        rules.append(experts(f"blocks.#.moe.experts.w_{ours}", f"blocks.#.{routed}.{theirs}.weight"))
        rules.append(experts(f"blocks.#.moe.experts.bias_{ours}", f"blocks.#.{routed}.{theirs}.bias"))
        if shared:
            for kind in KINDS:
                rules.append(same(f"blocks.#.moe.shared.w_{ours}.{kind}", f"blocks.#.{shared}.{theirs}.{kind}"))
    return rules


def gated_experts(routed: str, shared: str) -> list[Rule]:
    """SwiGLU experts without biases: gate_proj, up_proj and down_proj."""
    gate, up, down = (f"{part}_proj.weight" for part in ("gate", "up", "down"))
    return [
        experts("blocks.#.moe.experts.w_in", f"blocks.#.{routed}.{gate}", f"blocks.#.{routed}.{up}"),
        experts("blocks.#.moe.experts.w_out", f"blocks.#.{routed}.{down}"),
        joined("blocks.#.moe.shared.w_in.weight", f"blocks.#.{shared}.{gate}", f"blocks.#.{shared}.{up}"),
        same("blocks.#.moe.shared.w_out.weight", f"blocks.#.{shared}.{down}"),
    ]
