"""Bytes that autograd keeps of a Diffusion Transformer."""

# D width, H hidden width of a feed-forward; e bytes of a number that matrices are multiplied in

from __future__ import annotations

from dit_moe.costs.saved import FP32, Network, Saved, experts
from dit_moe.models import DiTConfig
from dit_moe.models.dit_config import FREQUENCIES


def network(model: DiTConfig, e: int, active: float) -> Network:
    d = model.need("width")
    # The final layer's norm and linear; the embedding of time, the conditioning c, and the final layer's adaLN.
    ends = Saved(token=8 * d + 8 + e * d, row=e * (FREQUENCIES + 5 * d) + 4 * d, weights=3 * d * d)
    return Network(ends, [_block(model, index, e, active) for index in range(model.need("depth"))], stream=FP32 * d)


def _block(model: DiTConfig, index: int, e: int, active: float) -> Saved:
    """One transformer block. The residual stream and its norms are in fp32."""
    d, h = model.need("width"), model.need("mlp_hidden")
    # Twice: input of a norm, its output and two statistics; input of qkv; q, k and v; output of attention, and its
    # logarithm of sums for each head; output of the projection.
    token: float = 2 * (8 * d + 8) + e * 6 * d + 4 * model.need("heads")
    if model.qk_norm:  # without a fused kernel: q and k normalised and scaled, in bf16 also as fp32; attention's output
        token += 8 * d + 3 * e * d + (8 * d if e < FP32 else 0)
    row = e * 9 * d  # adaLN's input and six outputs, and 1 + scale twice
    matrices = 10 * d * d  # adaLN, qkv, projection
    block = Saved(token, row, matrices, matrices)
    if model.has_experts(index):
        return block + experts(model, e, active) + Saved(FP32 * d)  # their sum, for the gate
    # Input of the first matrix; before and after the activation; output, for the gate.
    return block + Saved(e * (2 * d + 2 * h), 0, 2 * d * h, 2 * d * h)
