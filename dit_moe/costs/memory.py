"""What a run will hold in the memory of each GPU: weights, gradients, optimizer state, and what autograd keeps."""

# D width, H hidden width of a feed-forward, V vocabulary; e bytes of a number that matrices are multiplied in

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dit_moe.config import ConfigError
from dit_moe.costs.machine_memory import memory_of_machine
from dit_moe.models import DiTConfig, LMConfig
from dit_moe.models.base import TransformerConfig
from dit_moe.models.embedders import FREQUENCIES
from dit_moe.moe import MATRICES
from dit_moe.text.objective import CHUNK

FP32 = 4  # bytes
MARGIN = 2  # times the memory of a machine that are refused


def memory(experiment: Any, precision: str, gpus: int, rows: int, active: float | None = None) -> dict[str, float]:
    """Bytes on each GPU by what they hold, with `rows` in a forward pass and `active` experts a token or the target.

    Their sum is an upper bound: gradients come as activations go. Left out are, of an image model, the loss's own
    tensors, a few times the latents', and a first stage that encodes on the fly.
    """
    model, train, e = experiment.model, experiment.train, _bytes(precision)
    whole = FP32 * model.footprint().total_params
    sharded = gpus > 1 and train.parallel == "fsdp2"
    part = whole / gpus if sharded else whole
    several = rows * gpus < train.batch_size
    held = {
        "weights": part,
        "gradients": whole if several and sharded else part,  # micro-batches add up whole ones
        "AdamW": 2 * part,
        "EMA": part,
    }
    if sharded:
        tables = FP32 * network(model, e).tables
        held["gathered blocks"] = 3 * (whole - tables) / model.depth  # weights of this and the next, gradients of one
        if tables:
            held["gathered tables"] = 2 * tables  # they stay for the whole pass, and so do their gradients
    held["activations"] = activation_bytes(model, rows, precision, active=active)
    if isinstance(model, LMConfig):
        held["logits"] = logits_bytes(rows * model.tokens * model.need("vocab_size"), e)
    return held


def require_room(experiment: Any) -> None:
    """ConfigError for a model, or a batch of it, that the memory of this machine and its GPUs together cannot hold.

    Only what exceeds it `MARGIN` times is refused: the estimate is none of swap, offloading or what a process holds.
    """
    model, train = experiment.model, experiment.train
    there = memory_of_machine()
    there += sum(torch.cuda.get_device_properties(gpu).total_memory for gpu in range(torch.cuda.device_count()))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rows = min(train.micro_batch or train.batch_size, -(-train.batch_size // processes))
    whole = model.footprint().total_params
    needs = {
        "model.name": (f"={model.name} has {whole:,} parameters", FP32 * whole, "choose a smaller model"),
        "train.batch_size": (f"={train.batch_size:,} rows a step", 8 * train.batch_size, "lower it"),
        "train.micro_batch": (
            f"={rows:,} rows at a time",
            activation_bytes(model, rows, "bf16", recompute=True),
            "set it to fewer rows",
        ),
    }
    for key, (what, held, remedy) in needs.items():
        if held > MARGIN * there:
            problem = f"{what}: they take {held / 2**30:,.0f} GiB, and there are {there / 2**30:,.0f} here"
            raise ConfigError(key, f"{problem}; {remedy}")


def activation_bytes(
    model: TransformerConfig, rows: int, precision: str, recompute: bool | None = None, active: float | None = None
) -> float:
    """What the backward pass of `rows` needs of the forward pass.

    Args:
        recompute: None is what the model says.
        active: experts a token, on average; None is the target.
    """
    e, recompute = _bytes(precision), model.recompute if recompute is None else recompute
    return network(model, e, active).bytes(rows * model.tokens, rows, e, recompute)


def peak_active(model: TransformerConfig) -> float | None:
    """The most active experts a token, on average over a step, that training is to be ready for.

    None: as many as `network` takes by itself.
    """
    moe = model.moe
    return None if moe is None or moe.capacity_factor else moe.router.peak(moe.experts, moe.target)


def _bytes(precision: str) -> int:
    return 2 if precision == "bf16" else FP32


# ------------------------------------------------------------------------------------------- what autograd keeps


@dataclass(frozen=True)
class Saved:
    """What autograd keeps of a part of the network: bytes for each token and each row, and matrices it multiplies.

    A row is one sample of a batch. In bf16 autograd keeps a copy of every matrix; in fp32 it keeps the parameter
    itself, which costs nothing.
    """

    token: float = 0
    row: float = 0
    weights: int = 0  # elements
    cached: int = 0  # those of them that autocast copies by itself

    # What only exists while the backward pass computes the experts again: bytes of a token, elements of matrices.
    again: float = 0.0
    again_weights: int = 0

    def bytes(self, tokens: float, rows: float, e: int) -> float:
        return self.token * tokens + self.row * rows + (self.weights * e if e < FP32 else 0)

    def __add__(self, other: Saved) -> Saved:
        return Saved(
            self.token + other.token,
            self.row + other.row,
            self.weights + other.weights,
            self.cached + other.cached,
            self.again + other.again,
            self.again_weights + other.again_weights,
        )


@dataclass(frozen=True)
class Network:
    """A whole network: its blocks, and what is before and behind them."""

    ends: Saved
    blocks: Sequence[Saved]
    stream: float  # bytes of a token between two blocks
    tables: int = 0  # elements of embeddings outside of the blocks, where they count

    def bytes(self, tokens: float, rows: float, e: int, recompute: bool) -> float:
        """Of a forward pass, and where something is computed again what one block of it keeps then."""
        copies = e if e < FP32 else 0
        again = max(block.again * tokens + block.again_weights * copies for block in self.blocks)
        ends = self.ends.bytes(tokens, rows, e) + again
        if not recompute:
            return ends + sum(block.bytes(tokens, rows, e) for block in self.blocks)
        largest = max(block.bytes(tokens, rows, e) for block in self.blocks)
        inputs = self.stream * tokens * (len(self.blocks) - 1)  # of the other blocks
        # At the end of the forward pass autocast holds a copy of every matrix but the experts', which cast their own.
        cached = sum(block.cached for block in self.blocks) * copies
        return ends + inputs + max(largest, cached)


def network(model: TransformerConfig, e: int, active: float | None = None) -> Network:
    """What autograd keeps of a model that multiplies numbers of `e` bytes, at `active` experts, or the target's; with a
    capacity at as many as there is room for."""
    moe = model.moe
    if moe is not None and moe.capacity_factor is not None:
        active = min(moe.capacity_factor * moe.target, moe.experts)
    return NETWORKS[type(model)](model, e, (0.0 if moe is None else moe.target) if active is None else active)


def _experts(model: TransformerConfig, e: int, active: float) -> Saved:
    """A feed-forward with experts, of which a token uses `active` on average."""
    moe, d = model.moe, model.need("width")
    assert moe is not None
    w, shared, matrices = model.expert_hidden, model.shared_width, MATRICES[moe.activation or model.activation]
    acting = 4 if matrices == 3 else 2  # times the hidden width: before and after the activation
    rows = 2 if moe.router.SCORES else 1  # in; and out, for the gradient of their gates
    pairs = active * (e * (rows * d + acting * w) + 4 * d)  # rows out once more weighted
    token = moe.router.saved(moe.experts, d) + active * 20 + (0 if moe.recompute else pairs)  # indices
    if shared:
        token += e * acting * shared + (2 * d if e < FP32 else 0)
    cached = matrices * d * shared
    routed = moe.experts * matrices * d * w
    if moe.recompute:
        return Saved(token, 0, cached, cached, pairs, routed)
    return Saved(token, 0, cached + routed, cached)


# ---------------------------------------------------------------------------------------- the Diffusion Transformer


def _dit(model: DiTConfig, e: int, active: float) -> Network:
    d = model.need("width")
    # The final layer's norm and linear; the embedding of time, the conditioning c, and the final layer's adaLN.
    ends = Saved(token=_dit_norm(model) + e * d, row=e * (FREQUENCIES + 5 * d) + 4 * d, weights=3 * d * d)
    return Network(ends, [_dit_block(model, index, e, active) for index in range(model.need("depth"))], stream=FP32 * d)


def _dit_norm(model: DiTConfig) -> int:
    """Input and output in fp32, and two statistics; for RMS also the input before its weights, and one statistic."""
    d = model.need("width")
    return 12 * d + 4 if model.norm == "rms_norm" else 8 * d + 8


def _dit_block(model: DiTConfig, index: int, e: int, active: float) -> Saved:
    """One transformer block. The residual stream and its norms are in fp32."""
    d, h, heads = model.need("width"), model.need("mlp_hidden"), model.need("heads")
    # Two norms; input of qkv; q, k and v; output of attention, and its logarithm of sums for each head; output of the
    # projection.
    token: float = 2 * _dit_norm(model) + e * 6 * d + 4 * heads
    if model.qk_norm or model.has_rotary:  # q and k as they meet each other; attention's output once more
        token += 3 * e * d
    if model.qk_norm:  # q and k in bf16 also as fp32
        token += 8 * d if e < FP32 else 0
        token += 16 * heads if model.qk_norm == "layer_norm" else 8 * d  # statistics; normalised, not yet scaled
    row = e * 9 * d  # adaLN's input and six outputs, and 1 + scale twice
    matrices = 10 * d * d  # adaLN, qkv, projection
    block = Saved(token, row, matrices, matrices)
    if model.has_experts(index):
        return block + _experts(model, e, active) + Saved(FP32 * d)  # their sum, for the gate
    # Input of the first matrix; before and after the activation, and of SwiGLU the product; output, for the gate.
    matrices = MATRICES[model.activation] * d * h
    return block + Saved(e * (2 * d + (4 if model.activation == "swiglu" else 2) * h), 0, matrices, matrices)


# ----------------------------------------------------------------------------------------------- the language model


def _decoder(model: LMConfig, e: int, active: float) -> Network:
    d, vocab = model.need("width"), model.need("vocab_size")
    ends = Saved(token=_norm(d) + e * d, weights=vocab * d, cached=vocab * d)  # the last norm; the head's input
    tables = vocab * d * (1 if model.tied else 2)
    return Network(
        ends, [_decoder_block(model, index, e, active) for index in range(model.need("depth"))], FP32 * d, tables
    )


def logits_bytes(logits: float, e: int, chunk: int = CHUNK) -> float:
    """At most, while the loss and the gradient of so many logits are computed: `dit_moe.text.objective`."""
    # Logits and, as chunks and put together, their gradients; of a chunk in fp32 its copy, softmax and two gradients.
    return 2 * e * logits + (4 if e < FP32 else 3) * FP32 * min(logits, chunk)


def _norm(width: int) -> float:
    """Input and normalised input in fp32 (without a fused kernel), and their scale."""
    return 2 * FP32 * width + FP32


def _decoder_block(model: LMConfig, index: int, e: int, active: float) -> Saved:
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
        return block + _experts(model, e, active)
    # Input of the first matrix; gate and up, the activation of one, and its product with the other.
    return block + Saved(e * (d + 4 * h), 0, 3 * d * h, 3 * d * h)


NETWORKS: dict[type, Callable[[Any, int, float], Network]] = {DiTConfig: _dit, LMConfig: _decoder}
"""A new family of models: a function like these, and its line here."""
