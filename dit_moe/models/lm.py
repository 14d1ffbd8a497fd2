"""A decoder-only language model of OLMoE's shape (arXiv 2409.02060) with dense or Mixture-of-Experts feed-forwards.

Pre-norm blocks with RMS norms, rotary position embedding, norms on queries and keys, SwiGLU, and no biases.
"""

# B batch, S tokens of a sequence, K tokens that may be attended to, D width, H heads, Q width of a head, V vocabulary

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_moe.models.base import MODELS, Aux, RMSNorm, Transformer, run_blocks
from dit_moe.models.lm_config import LMConfig
from dit_moe.moe import Experts, FeedForward, MoELayer


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
        self.moe = MoELayer(moe, width, hidden, config.ACTIVATION) if moe else None
        self.mlp = None if moe else FeedForward(width, hidden, config.ACTIVATION)

    def forward(self, x_BSD: Tensor, *args: Any) -> tuple[Tensor, Aux]:
        x_BSD = x_BSD + self.attn(self.norm1(x_BSD), *args)
        h_BSD, aux = self.norm2(x_BSD), {}
        if self.moe is not None:
            h_BSD, aux = self.moe(h_BSD)
        elif self.mlp is not None:
            h_BSD = self.mlp(h_BSD)
        return x_BSD + h_BSD, aux


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
        for module in self.modules():
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
