"""Bytes that a decoder-only language model and its loss hold beside the weights."""

# D width, H hidden width of a feed-forward, V vocabulary; e bytes of a number that matrices are multiplied in

from __future__ import annotations

from dit_moe.costs.saved import FP32, Network, Saved, experts
from dit_moe.models import LMConfig
from dit_moe.text.objective import CHUNK


def network(model: LMConfig, e: int, active: float) -> Network:
    d, vocab = model.need("width"), model.need("vocab_size")
    ends = Saved(token=_norm(d) + e * d, weights=vocab * d, cached=vocab * d)  # the last norm; the head's input
    tables = vocab * d * (1 if model.tied else 2)
    return Network(ends, [_block(model, index, e, active) for index in range(model.need("depth"))], FP32 * d, tables)


def logits_bytes(logits: float, e: int, chunk: int = CHUNK) -> float:
    """At most, while the loss and the gradient of so many logits are computed: `dit_moe.text.objective`."""
    # Logits and, as chunks and put together, their gradients; of a chunk in fp32 its copy, softmax and two gradients.
    return 2 * e * logits + (4 if e < FP32 else 3) * FP32 * min(logits, chunk)


def _norm(width: int) -> float:
    """Input and normalised input in fp32 (without a fused kernel), and their scale."""
    return 2 * FP32 * width + FP32


def _block(model: LMConfig, index: int, e: int, active: float) -> Saved:
    """One decoder block. The residual stream and its norms are in fp32."""
    d, k, h = model.need("width"), model.kv_width, model.need("mlp_hidden")
    inputs = 3 if e < FP32 else 1  # of the matrices of q, k and v: each has its own copy, or all the same one
    # Two norms; inputs; q, k, v and the output of attention, which is brought into order for its projection, and the
    # logarithm of sums for each head.
    token = 2 * _norm(d) + e * (inputs * d + 3 * d + 2 * k) + FP32 * model.need("heads")
    if model.qk_norm:
        token += _norm(d) + _norm(k)
    if model.clip_qkv is not None:
        token += e * (d + 2 * k)  # before it
    matrices = 2 * d * d + 2 * d * k
    block = Saved(token, 0, matrices, matrices)
    if model.has_experts(index):
        return block + experts(model, e, active)
    # Input of the first matrix; gate and up, the activation of one, and its product with the other.
    return block + Saved(e * (d + 4 * h), 0, 3 * d * h, 3 * d * h)
