"""A decoder-only language model of OLMoE's shape (arXiv 2409.02060) with dense or Mixture-of-Experts feed-forwards.

Pre-norm blocks with RMS norms, rotary position embedding, norms on queries and keys, SwiGLU, and no biases.

``LM-1.3B`` is dense, ``LM-1.3B-6.9B-64E8A`` has 64 experts of which 8 are active on average, at the dense model's
active compute; the total, 6.9 B, may be left out, and is checked if it is there. Size 1.3B is OLMoE-1B-7B's; 0.4B and
2.4B are the other scales of the DTop-p paper, in shapes of ours, as it does not publish them.
"""

# B batch, S tokens of a sequence, K tokens that may be attended to, D width, H heads, Q width of a head, V vocabulary

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_moe.config import ConfigError, require
from dit_moe.models.base import MODELS, Aux, Footprint, RMSNorm, Shape, Transformer, TransformerConfig, run_blocks
from dit_moe.moe import Activation, Experts, FeedForward, MoELayer

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
        r"LM-(?P<size>[A-Za-z]+|\d+(\.\d+)?B)(-(?P<total>\d{1,6}(\.\d{1,9})?)B)?"
        r"(-(?P<experts>[1-9]\d{0,5})E(?P<target>\d{1,6}(\.\d{1,9})?)A)?"
    )
    FORM = "LM-<size>[-<total>B][-<experts>E<active>A]"
    SIZES = SIZES
    activation: ClassVar[Activation] = "swiglu"
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
        if self.moe is not None:
            try:
                self.moe.router.check_text()
            except ConfigError as error:
                raise error.below("moe.router") from None
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
            total_params=round(everywhere + experts.routed + experts.idle_biases),
            active_params=everywhere + experts.active,
            forward_flops=2 * (tokens * per_token + depth * 2 * tokens**2 * d),  # QKᵀ whole, as kernels are counted
        )


class Cache(Protocol):
    """Keys and values of the tokens so far; those of transformers fit."""

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append [B, heads, S, Q] of a layer and return all of that layer, [B, heads, K, Q]."""
        ...


Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of every angle, [B, 1, S, Q/2] in fp32."""


def rotation(positions_BS: Tensor, head_dim: int, theta: float) -> Rotation:
    """The rotary embedding (Su et al. 2021) of positions: pair j of a head turns by position · theta^(−2j/Q)."""
    exponent = torch.arange(0, head_dim, 2, device=positions_BS.device, dtype=torch.float32) / head_dim
    angles = positions_BS[:, None, :, None].float() * theta**-exponent
    return angles.cos(), angles.sin()


def rotate(x_BHSQ: Tensor, by: Rotation) -> Tensor:
    """Turn the pairs (j, j + Q/2) of every head, in fp32."""
    cos, sin = by
    first, second = x_BHSQ.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BHSQ.dtype)


class CausalAttention(nn.Module):
    """Self-attention to earlier tokens, with grouped keys and values if the config has fewer heads of them."""

    def __init__(self, config: LMConfig, layer: int) -> None:
        super().__init__()
        width, kv_width = config.need("width"), config.kv_width
        self.layer, self.clip = layer, config.clip_qkv
        self.head_dim = width // config.need("heads")
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, kv_width, bias=False)
        self.v = nn.Linear(width, kv_width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.q_norm = RMSNorm(width, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(kv_width, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.grouped = kv_width < width

    def forward(self, x_BSD: Tensor, by: Rotation, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """`mask` bool [B, 1, S, K], True where a token may attend; None: to itself and all before it."""
        parts = self.q_norm(self.q(x_BSD)), self.k_norm(self.k(x_BSD)), self.v(x_BSD)
        if self.clip is not None:
            parts = tuple(part.clamp(-self.clip, self.clip) for part in parts)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        q, k = rotate(q, by), rotate(k, by)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        fresh = q.shape[2] == k.shape[2]
        if mask is None and not fresh:
            mask = causal_mask(q.shape[2], k.shape[2], q.device)
        out_BHSQ = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped
        )
        return self.out(out_BHSQ.transpose(1, 2).flatten(2))


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Bool [S, K] for the last S of K tokens: each attends to itself and all before it."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


class DecoderBlock(nn.Module):
    """Attention and feed-forward, each behind an RMS norm."""

    def __init__(self, config: LMConfig, index: int) -> None:
        super().__init__()
        width, hidden = config.need("width"), config.need("mlp_hidden")
        self.norm1 = RMSNorm(width, eps=config.norm_eps)
        self.attn = CausalAttention(config, index)
        self.norm2 = RMSNorm(width, eps=config.norm_eps)
        moe = config.moe if config.has_experts(index) else None
        self.moe = MoELayer(moe, width, hidden, config.activation) if moe else None
        self.mlp = None if moe else FeedForward(width, hidden, config.activation)

    def forward(self, x_BSD: Tensor, earlier_NE: Tensor | None, *args: Any) -> tuple[Tensor, Aux, Tensor | None]:
        """See `run_blocks`."""
        x_BSD = x_BSD + self.attn(self.norm1(x_BSD), *args)
        h_BSD, aux = self.norm2(x_BSD), {}
        if self.moe is not None:
            h_BSD, routing = self.moe(h_BSD, earlier_NE=earlier_NE)
            aux, earlier_NE = routing.aux, routing.handed_on_NE
        elif self.mlp is not None:
            h_BSD = self.mlp(h_BSD)
        return x_BSD + h_BSD, aux, earlier_NE


class TiedEmbedding(nn.Embedding):
    """Token ids → states and, by the same matrix, states → logits.

    Both go through the module's call, and so meet its hooks, such as the one that brings offloaded weights.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight) if input.is_floating_point() else super().forward(input)


@MODELS.register("LM", LMConfig)
class LM(Transformer):
    """Tokens → logits of the next one.

    Args:
        config: with every field resolved; ValueError names the first that is not.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        width, vocab = config.need("width"), config.need("vocab_size")
        self.embed = (TiedEmbedding if config.tied else nn.Embedding)(vocab, width)
        self.blocks = nn.ModuleList(DecoderBlock(config, index) for index in range(config.need("depth")))
        self.norm = RMSNorm(width, eps=config.norm_eps)
        self.head = None if config.tied else nn.Linear(width, vocab, bias=False)
        self.gradient_checkpointing = config.recompute  # the name by which transformers switches it
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A normal distribution cut at three standard deviations, as OLMoE's; routers and norms bring their own."""
        std = self.config.init_std
        for module in self.modules_but_routers():
            matrices: list[Tensor] = []
            if isinstance(module, Experts):
                matrices = [module.w_in, module.w_out]
            elif isinstance(module, nn.Linear | nn.Embedding):
                matrices = [module.weight]
            for matrix in matrices:
                nn.init.trunc_normal_(matrix, std=std, a=-3 * std, b=3 * std)

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        last: int | None = None,
        states: bool = False,
        return_aux: bool = False,
    ) -> Any:
        """Logits [B, S, V] of the token after each of `tokens`, int64 [B, S].

        Args:
            documents: whole numbers [B, S]; tokens attend only to those with the same number. None: to all before.
            positions: whole numbers [B, S] for the rotary embedding; None: 0 … S − 1.
            mask: bool [B, 1, S, K], True where a token may attend; it takes the place of both.
            cache: keys and values of earlier tokens.
            last: of so many last tokens only; None: of all.
            states: return the states [B, S, D] that `project` makes logits of, instead of these.
            return_aux: also return the routers' loss terms by name: scalars, unweighted, means over the MoE layers;
                none in evaluation.
        """
        length, config = tokens.shape[1], self.config
        if positions is None:
            positions = torch.arange(length, device=tokens.device)[None]
        if mask is None and documents is not None:
            same = documents[:, None, :, None] == documents[:, None, None, :]
            mask = same & causal_mask(length, length, tokens.device)
        by = rotation(positions, config.need("width") // config.need("heads"), config.rope_theta)
        recompute = self.gradient_checkpointing and self.training and cache is None  # which would grow twice
        x_BSD, aux = run_blocks(self.blocks, self.embed(tokens), by, mask, cache, recompute=recompute)
        out = self.norm(x_BSD if last is None else x_BSD[:, -last:])
        out = out if states else self.project(out)
        return (out, aux) if return_aux else out

    def project(self, x_BSD: Tensor) -> Tensor:
        """Logits of states."""
        return self.embed(x_BSD) if self.head is None else self.head(x_BSD)
