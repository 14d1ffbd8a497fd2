"""Names, shapes and predicted costs of decoder-only language models of OLMoE's shape (arXiv 2409.02060).

``LM-1.3B`` is dense, ``LM-1.3B-6.9B-64E8A`` has 64 experts of which 8 are active on average, at the dense model's
active compute; the total, 6.9 B, may be left out, and is checked if it is there. Size 1.3B is OLMoE-1B-7B's; 0.4B and
2.4B are the other scales of the DTop-p paper, in shapes of ours, as it does not publish them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from dit_moe.config import require
from dit_moe.models.base import Footprint, Shape, TransformerConfig
from dit_moe.moe import Activation

SIZES = {
    "tiny": Shape(4, 128, 4, 512),
    "0.4B": Shape(16, 1024, 16, 4096),
    "1.3B": Shape(16, 2048, 16, 8192),
    "2.4B": Shape(20, 2560, 20, 10240),
}
TOLERANCE = 0.05  # of the total in a name: it is rounded, and vocabularies differ


@dataclass(frozen=True, kw_only=True)
class LMConfig(TransformerConfig):
    """A language model: ``LM-<size>`` with an optional ``-<total>B`` and an optional ``-<experts>E<active>A``."""

    NAME = re.compile(
        r"LM-(?P<size>[A-Za-z]+|\d+(\.\d+)?B)(-(?P<total>\d+(\.\d+)?)B)?"
        r"(-(?P<experts>[1-9]\d*)E(?P<target>\d+(\.\d+)?)A)?"
    )
    FORM = "LM-<size>[-<total>B][-<experts>E<active>A]"
    SIZES = SIZES
    ACTIVATION: ClassVar[Activation] = "swiglu"
    KIND = "text"

    kv_heads: int | None = None  # heads of keys and values; None: heads
    vocab_size: int | None = None  # (data) rows of the embedding; the tokenizer's size, rounded up to a multiple of 64
    max_length: int | None = None  # (data) tokens of a training sequence
    tied: bool = False  # the output matrix is the embedding
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    qk_norm: bool = True  # RMS norm over all queries, and all keys, of a token
    clip_qkv: float | None = None  # queries, keys and values are clamped to ± this
    init_std: float = 0.02  # of embeddings and matrices, cut at three of them; routers bring their own

    def __post_init__(self) -> None:
        match = self._resolve_name()
        self._check_blocks()
        heads, head_dim = self.need("heads"), self.need("width") // self.need("heads")
        require(head_dim % 2 == 0, self, "width", f"/ heads={heads} must be even for the rotary embedding")
        for field in ("kv_heads", "vocab_size", "max_length", "clip_qkv"):
            value = getattr(self, field)
            require(value is None or value > 0, self, field, "must be above 0")
        require(heads % (self.kv_heads or heads) == 0, self, "kv_heads", f"does not divide heads={heads}")
        for field in ("rope_theta", "norm_eps", "init_std"):
            require(getattr(self, field) > 0, self, field, "must be above 0")
        if match["total"] and self.vocab_size is not None:
            billions = self.footprint_of(1).total_params / 1e9
            fits = abs(billions / float(match["total"]) - 1) <= TOLERANCE
            require(
                fits, self, "name", f"states {match['total']} B parameters, but it has {billions:.3g} B; correct it"
            )

    @property
    def tokens(self) -> int:
        return self.need("max_length")

    @property
    def kv_width(self) -> int:
        """Width of the keys of a token, and of its values."""
        return self.need("width") // self.need("heads") * (self.kv_heads or self.need("heads"))

    def footprint(self) -> Footprint:
        return self.footprint_of(self.tokens)

    def footprint_of(self, tokens: int) -> Footprint:
        """That of sequences of so many tokens."""
        d, h, depth, vocab = self.need("width"), self.need("mlp_hidden"), self.need("depth"), self.need("vocab_size")
        attention = depth * (2 * d * d + 2 * d * self.kv_width)
        dense = self.dense_blocks * 3 * d * h
        norms = (2 * depth + 1) * d + (depth * (d + self.kv_width) if self.qk_norm else 0)
        tables = vocab * d * (1 if self.tied else 2)
        experts = self.expert_weights()
        everywhere = attention + dense + norms + tables + experts.scalars + experts.always
        per_token = attention + dense + vocab * d + experts.always + experts.active
        return Footprint(
            total_params=int(everywhere + experts.routed),
            active_params=everywhere + experts.active,
            forward_flops=2 * (tokens * per_token + depth * 2 * tokens**2 * d),  # QKᵀ whole, as kernels are counted
        )
