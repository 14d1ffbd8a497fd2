"""Bytes that autograd keeps of a forward pass: how they are counted, and those of what every family's blocks share."""

# D width, H hidden width of a feed-forward, E experts; e bytes of a number that matrices are multiplied in

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dit_moe.models.base import TransformerConfig
from dit_moe.moe import MATRICES

FP32 = 4  # bytes


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

    def bytes(self, tokens: float, rows: float, e: int) -> float:
        return self.token * tokens + self.row * rows + (self.weights * e if e < FP32 else 0)

    def __add__(self, other: Saved) -> Saved:
        return Saved(
            self.token + other.token, self.row + other.row, self.weights + other.weights, self.cached + other.cached
        )


@dataclass(frozen=True)
class Network:
    """A whole network: its blocks, and what is before and behind them."""

    ends: Saved
    blocks: Sequence[Saved]
    stream: float  # bytes of a token between two blocks
    tables: int = 0  # elements of embeddings outside of the blocks, where they count

    def bytes(self, tokens: float, rows: float, e: int, recompute: bool) -> float:
        """Of a forward pass; with `recompute` also what the pass through one block keeps again."""
        ends = self.ends.bytes(tokens, rows, e)
        if not recompute:
            return ends + sum(block.bytes(tokens, rows, e) for block in self.blocks)
        largest = max(block.bytes(tokens, rows, e) for block in self.blocks)
        inputs = self.stream * tokens * (len(self.blocks) - 1)  # of the other blocks
        # At the end of the forward pass autocast holds a copy of every matrix but the experts', which cast their own.
        copies = sum(block.cached for block in self.blocks) * e if e < FP32 else 0
        return ends + inputs + max(largest, copies)


def experts(model: TransformerConfig, e: int, active: float) -> Saved:
    """A feed-forward with experts, of which a token uses `active` on average."""
    moe, d = model.moe, model.need("width")
    assert moe is not None
    w, gated = model.expert_hidden, MATRICES[moe.activation or model.ACTIVATION] == 3
    into, acting = (2 * w, 4 * w) if gated else (w, 2 * w)  # first matrix; before and after the activation
    token: float = FP32 * d + moe.experts * (25 if moe.router.drn else 21) + 16  # the router's input; probabilities
    token += active * (e * (2 * d + acting) + 4 * d + 20)  # rows in and out, out once more weighted; indices
    expert, cached = d * (into + w), 0
    if moe.shared_experts:
        token += moe.shared_experts * e * acting + (2 * d if e < FP32 else 0)
        cached = moe.shared_experts * expert
    return Saved(token, 0, cached + moe.experts * expert, cached)
