"""The Diffusion Transformer (Peebles & Xie 2023) with dense or Mixture-of-Experts feed-forwards.

The dense model keeps the original's state-dict keys and numerics, so its public weights load as they are. ``DiT-S/2``
is dense, ``DiT-S/2-8E2A`` has 8 experts of which 2 are active on average, at the dense model's active compute.

The published sizes S, B, L and XL are those of the paper. Size H is ours: ``DiT-H/2-64E8A`` has 3.4 B parameters of
which 0.9 B are active, the scale of the DTop-p paper's image model, whose exact width and depth are not published.
"""

# B batch, C channels, H height = width, P patch size, S tokens, D width

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, overload

from torch import Tensor, nn

from dit_moe.config import require
from dit_moe.models.base import (
    MODELS,
    Aux,
    Footprint,
    LayerNorm,
    RMSNorm,
    Shape,
    Transformer,
    TransformerConfig,
    run_blocks,
)
from dit_moe.models.embedders import FREQUENCIES, LabelEmbedder, TimestepEmbedder
from dit_moe.models.positions import rotary_position_embedding, sincos_position_embedding
from dit_moe.moe import MATRICES, Activation, MoELayer, RoutingContext

SIZES = {
    "S": Shape(12, 384, 6, 1536),
    "B": Shape(12, 768, 12, 3072),
    "L": Shape(24, 1024, 16, 4096),
    "XL": Shape(28, 1152, 16, 4608),
    "H": Shape(27, 1408, 22, 4672),  # 4672 / 8 = 584 is the hidden width of a 64E8A expert
}


def hidden_width(gelu_hidden: int, activation: Activation) -> int:
    """That of a dense feed-forward where one with GELU has `gelu_hidden`: with SwiGLU two thirds, as LightningDiT's."""
    return 2 * gelu_hidden // 3 if activation == "swiglu" else gelu_hidden


@dataclass(frozen=True, kw_only=True)
class DiTConfig(TransformerConfig):
    """A Diffusion Transformer: ``DiT-<size>/<patch>`` with an optional ``-<experts>E<active>A``."""

    NAME = re.compile(
        r"DiT-(?P<size>[A-Za-z]+)/(?P<patch>[1-9]\d{0,5})(-(?P<experts>[1-9]\d{0,5})E(?P<target>\d{1,6}(\.\d{1,9})?)A)?"
    )
    FORM = "DiT-<size>/<patch>[-<experts>E<active>A]"
    SIZES = SIZES
    KIND = "images"

    patch_size: int | None = None  # (name)
    in_channels: int | None = None  # (data) channels of a latent
    input_size: int | None = None  # (data) height and width of a latent
    num_classes: int | None = None  # (data) the null class of guidance has this index
    learn_sigma: bool | None = None  # (data, objective) 2·in_channels outputs
    position_embedding: Literal["absolute", "rotary", "both"] = "absolute"  # absolute: fixed sines added to the tokens
    rotary_grid: int | None = None  # tokens a row that rotary positions are spread over; None: as many as there are
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"  # before attention, feed-forward and output; RMS has weights
    activation: Activation = "gelu"  # SwiGLU has three matrices, and so two thirds of the hidden width
    qk_norm: bool | Literal["layer_norm"] = False  # normalise queries and keys, true: by RMS; steadier in long runs
    qk_norm_eps: float | None = None  # None: 1.2e-7 for the RMS norm, 1e-6 for layer_norm
    mlp_norm_eps: float = 1e-6  # of the norm before the feed-forward; diffusers: 1e-5
    freq_shift: int = 0  # the frequencies of time are 10000^(-i / (128 - freq_shift)); diffusers: 1

    def __post_init__(self) -> None:
        match = self._resolve_name()
        self._resolve("patch_size", int(match["patch"]))
        self._check_blocks()
        for field in ("in_channels", "input_size", "num_classes"):
            value = getattr(self, field)
            require(value is None or value >= 1, self, field, "must be at least 1")
        self._check_positions()
        require(0 < self.mlp_norm_eps < math.inf, self, "mlp_norm_eps", "must be positive and finite")
        require(0 <= self.freq_shift < FREQUENCIES // 2, self, "freq_shift", "must lie between 0 and 127")
        eps = self.qk_norm_eps
        require(eps is None or 0 < eps < math.inf, self, "qk_norm_eps", "must be positive and finite")
        require(eps is None or bool(self.qk_norm), self, "qk_norm_eps", "needs qk_norm; set that, or drop the line")
        if self.input_size is not None:
            patch = self.need("patch_size")
            wanted = f"does not divide input_size={self.input_size}; choose a patch size that does"
            require(self.input_size % patch == 0, self, "patch_size", wanted)
        if self.moe is not None and self.in_channels is not None:
            router = self.moe.router.for_patches(self.need("patch_size") ** 2 * self.in_channels)
            object.__setattr__(self, "moe", replace(self.moe, router=router))

    def _check_positions(self) -> None:
        width, head_dim = self.need("width"), self.need("width") // self.need("heads")
        absolute = not self.has_absolute or width % 4 == 0
        require(absolute, self, "width", "must be a multiple of 4 for the 2-D position embedding")
        rotary = not self.has_rotary or head_dim % 4 == 0
        require(rotary, self, "heads", f"leaves a head {head_dim} of width={width}; rotary needs a multiple of 4")
        grid = self.rotary_grid
        require(grid is None or grid >= 1, self, "rotary_grid", "must be at least 1")
        wanted = f"means nothing to position_embedding={self.position_embedding}; drop the line"
        require(grid is None or self.has_rotary, self, "rotary_grid", wanted)

    def _hidden(self, hidden: int) -> int:
        return hidden_width(hidden, self.activation)

    @property
    def has_absolute(self) -> bool:
        return self.position_embedding != "rotary"

    @property
    def has_rotary(self) -> bool:
        return self.position_embedding != "absolute"

    @property
    def side(self) -> int:
        """Tokens a row."""
        return self.need("input_size") // self.need("patch_size")

    @property
    def tokens(self) -> int:
        return self.side**2

    @property
    def out_channels(self) -> int:
        return self.need("in_channels") * (2 if self.learn_sigma else 1)

    def footprint(self) -> Footprint:
        d, h, depth, tokens = self.need("width"), self.need("mlp_hidden"), self.need("depth"), self.tokens
        pixels, into = self.need("patch_size") ** 2, (MATRICES[self.activation] - 1) * h
        # Linears by (inputs, outputs): those that every token meets, and those that every sample meets once.
        per_token = [(self.need("in_channels") * pixels, d), (d, self.out_channels * pixels)]
        per_token += depth * [(d, 3 * d), (d, d)] + self.dense_blocks * [(d, into), (h, d)]
        per_sample = [(FREQUENCIES, d), (d, d), (d, 2 * d)] + depth * [(d, 6 * d)]
        weights = sum(i * o for i, o in per_token), sum(i * o for i, o in per_sample)
        biases = sum(o for _, o in per_token + per_sample)
        experts = self.expert_weights()
        bare = (self.need("num_classes") + 1) * d + experts.scalars  # these tables and the norms cost no FLOPs
        bare += tokens * d if self.has_absolute else 0
        bare += (2 * depth + 1) * d if self.norm == "rms_norm" else 0
        vectors = {False: 0, True: 2, "layer_norm": 4}[self.qk_norm]  # a weight each, LayerNorm with a bias
        bare += depth * vectors * (d // self.need("heads"))
        everywhere = sum(weights) + biases + bare + experts.always
        attention = depth * 2 * tokens**2 * d  # multiply-adds of QKᵀ and of its product with V
        return Footprint(
            total_params=round(everywhere + experts.routed + experts.idle_biases),
            active_params=everywhere + experts.active,
            forward_flops=2 * (tokens * (weights[0] + experts.always + experts.active) + weights[1] + attention),
        )


def block_norm(config: DiTConfig, eps: float = 1e-6) -> nn.Module:
    """A norm over the width of the tokens."""
    if config.norm == "rms_norm":
        return RMSNorm(config.need("width"), eps=eps)
    return nn.LayerNorm(config.need("width"), elementwise_affine=False, eps=eps)


def modulate(x_BSD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    return x_BSD * (1 + scale_BD[:, None]) + shift_BD[:, None]


class Block(nn.Module):
    """Attention and feed-forward, each under adaptive layer norm with a zero-initialised gate (adaLN-Zero)."""

    def __init__(self, config: DiTConfig, index: int) -> None:
        # Here, as importing timm takes seconds, and a dry run builds no model.
        from timm.layers import AttentionRope, Mlp, SwiGLUPacked

        super().__init__()
        width, hidden = config.need("width"), config.need("mlp_hidden")
        self.norm1 = block_norm(config)
        qk_norm: Any = partial(RMSNorm, eps=config.qk_norm_eps)
        if config.qk_norm == "layer_norm":
            qk_norm = partial(LayerNorm, eps=config.qk_norm_eps or 1e-6)
        options = {"qk_norm": bool(config.qk_norm), "norm_layer": qk_norm, "num_prefix_tokens": 0}
        self.attn = AttentionRope(width, config.need("heads"), **options)
        self.norm2 = block_norm(config, config.mlp_norm_eps)
        moe = config.moe if config.has_experts(index) else None
        self.moe = MoELayer(moe, width, hidden, config.activation) if moe else None
        self.mlp: nn.Module | None = None
        if not moe and config.activation == "swiglu":
            self.mlp = SwiGLUPacked(width, 2 * hidden)  # fc1 gives [gate | up]
        elif not moe:
            act = nn.SiLU if config.activation == "silu" else partial(nn.GELU, approximate="tanh")
            self.mlp = Mlp(width, hidden, act_layer=act)  # type: ignore[arg-type]
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self,
        x_BSD: Tensor,
        earlier_NE: Tensor | None,
        c_BD: Tensor,
        context: RoutingContext,
        rotary_SQ: Tensor | None = None,
    ) -> tuple[Tensor, Aux, Tensor | None]:
        """See `run_blocks`; `rotary_SQ` is `rotary_position_embedding`'s."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c_BD).chunk(6, dim=1)
        x_BSD = x_BSD + gate1[:, None] * self.attn(modulate(self.norm1(x_BSD), shift1, scale1), rope=rotary_SQ)
        normal_BSD = self.norm2(x_BSD)
        h_BSD = modulate(normal_BSD, shift2, scale2)
        aux: Aux = {}
        if self.moe is not None:
            h_BSD, routing = self.moe(h_BSD, context, earlier_NE, normal_BSD)
            aux, earlier_NE = routing.aux, routing.handed_on_NE
        elif self.mlp is not None:
            h_BSD = self.mlp(h_BSD)
        return x_BSD + gate2[:, None] * h_BSD, aux, earlier_NE


class FinalLayer(nn.Module):
    """Adaptive norm and the projection to pixels of a patch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.need("width")
        self.norm_final = block_norm(config)
        self.linear = nn.Linear(width, config.need("patch_size") ** 2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BSD: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_BD).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x_BSD), shift, scale))


@MODELS.register("DiT", DiTConfig)
class DiT(Transformer):
    """Noisy latents, times and labels → the objective's prediction.

    Args:
        config: with every field resolved; ValueError names the first that is not.
    """

    label_table = "y_embedder.embedding_table.weight"  # the parameter with a row per class, and last the null class
    position_table = "pos_embed"  # the parameter with a row per place in a square

    def __init__(self, config: DiTConfig) -> None:
        from timm.layers import PatchEmbed

        super().__init__()
        self.config = config
        width, size, patch = config.need("width"), config.need("input_size"), config.need("patch_size")
        self.x_embedder = PatchEmbed(size, patch, config.need("in_channels"), width, bias=True)
        self.t_embedder = TimestepEmbedder(width, config.freq_shift)
        self.y_embedder = LabelEmbedder(config.need("num_classes"), width)
        # A parameter without gradient, as in the original, and no buffer: EMA and checkpoints treat it as a weight.
        absolute = sincos_position_embedding(width, config.side)[None] if config.has_absolute else None
        self.pos_embed = None if absolute is None else nn.Parameter(absolute, requires_grad=False)
        head_dim = width // config.need("heads")
        rotary = rotary_position_embedding(head_dim, config.side, config.rotary_grid) if config.has_rotary else None
        self.register_buffer("rotary_SQ", rotary, persistent=False)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.need("depth")))
        self.final_layer = FinalLayer(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """DiT's initialisation; routers and experts bring their own."""
        for module in self.modules_but_routers():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        tables = (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2])
        for table in tables:
            nn.init.normal_(table.weight, std=0.02)  # type: ignore[arg-type]
        for module in [*self.blocks, self.final_layer]:
            nn.init.zeros_(module.adaLN_modulation[-1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    @overload
    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, return_aux: Literal[False] = False, target: Tensor | None = None
    ) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, return_aux: Literal[True], target: Tensor | None = None
    ) -> tuple[Tensor, Aux]: ...
    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, return_aux: bool = False, target: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Aux]:
        """Predict [B, C or 2C, H, H] from latents x [B, C, H, H], times t [B] as the network sees them, labels y [B].

        With `return_aux`, also the routers' loss terms by name: scalars, unweighted, means over the MoE layers; none in
        evaluation. `target` is the objective's, [B, C, H, H]; see `wants_target`.
        """
        # In fp32 under autocast, too, and in memory token by token, which the output of the convolution is not.
        x_BSD = self.x_embedder(x).to(self.x_embedder.proj.weight.dtype).contiguous()
        if self.pos_embed is not None:
            x_BSD = x_BSD + self.pos_embed
        time_BD = self.t_embedder(t)
        c_BD = time_BD + self.y_embedder(y)
        null_label = self.config.need("num_classes")
        context = RoutingContext(
            samples=len(x),
            labels_B=y,
            null_label=null_label,
            time_BD=time_BD,
            target_NF=None if target is None else self.patchify(target).flatten(0, 1),
        )
        recompute = self.config.recompute and self.training
        x_BSD, aux = run_blocks(self.blocks, x_BSD, c_BD, context, self.rotary_SQ, recompute=recompute)
        out = self.unpatchify(self.final_layer(x_BSD, c_BD))
        return (out, aux) if return_aux else out

    def patchify(self, x: Tensor) -> Tensor:
        """Image [B, C, H, H] → pixels of its patches [B, S, P·P·C]; the inverse of `unpatchify`."""
        patch = self.config.need("patch_size")
        grid = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
        return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def unpatchify(self, x_BSF: Tensor) -> Tensor:
        """Pixels of patches [B, S, P·P·C] → image [B, C, H, H]."""
        patch, side = self.config.need("patch_size"), math.isqrt(x_BSF.shape[1])
        grid = x_BSF.unflatten(2, (patch, patch, self.config.out_channels)).unflatten(1, (side, side))
        # One reshape and no view of another tensor: fully_shard hooks on to what a model returns.
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.config.out_channels, side * patch, side * patch)
