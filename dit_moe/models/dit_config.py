"""Names, shapes and predicted costs of Diffusion Transformers.

``DiT-S/2`` is dense, ``DiT-S/2-8E2A`` has 8 experts of which 2 are active on average, at the dense model's active
compute. The published sizes S, B, L and XL are those of DiT (Peebles & Xie 2023).

Size H is ours: ``DiT-H/2-64E8A`` has 3.4 B parameters of which 0.9 B are active, the scale of the DTop-p paper's
image model, whose exact width and depth are not published.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from dit_moe.config import require
from dit_moe.models.base import Footprint, Shape, TransformerConfig
from dit_moe.moe import Activation

FREQUENCIES = 256  # width of the sinusoidal timestep embedding
SIZES = {
    "S": Shape(12, 384, 6, 1536),
    "B": Shape(12, 768, 12, 3072),
    "L": Shape(24, 1024, 16, 4096),
    "XL": Shape(28, 1152, 16, 4608),
    "H": Shape(27, 1408, 22, 4672),  # 4672 / 8 = 584 is the hidden width of a 64E8A expert
}


@dataclass(frozen=True, kw_only=True)
class DiTConfig(TransformerConfig):
    """A Diffusion Transformer: ``DiT-<size>/<patch>`` with an optional ``-<experts>E<active>A``."""

    NAME = re.compile(r"DiT-(?P<size>[A-Za-z]+)/(?P<patch>[1-9]\d*)(-(?P<experts>[1-9]\d*)E(?P<target>\d+(\.\d+)?)A)?")
    FORM = "DiT-<size>/<patch>[-<experts>E<active>A]"
    SIZES = SIZES
    ACTIVATION: ClassVar[Activation] = "gelu"
    KIND = "images"

    patch_size: int | None = None  # (name)
    in_channels: int | None = None  # (data) channels of a latent
    input_size: int | None = None  # (data) height and width of a latent
    num_classes: int | None = None  # (data) the null class of guidance has this index
    learn_sigma: bool | None = None  # (data, objective) 2·in_channels outputs
    qk_norm: bool = False  # RMS-normalise queries and keys: steadier beyond 2 M steps and in low precision

    def __post_init__(self) -> None:
        match = self._resolve_name()
        self._resolve("patch_size", int(match["patch"]))
        self._check_blocks()
        for field in ("in_channels", "input_size", "num_classes"):
            value = getattr(self, field)
            require(value is None or value >= 1, self, field, "must be at least 1")
        require(self.need("width") % 4 == 0, self, "width", "must be a multiple of 4 for the 2-D position embedding")
        if self.input_size is not None:
            patch = self.need("patch_size")
            wanted = f"does not divide input_size={self.input_size}; choose a patch size that does"
            require(self.input_size % patch == 0, self, "patch_size", wanted)

    @property
    def tokens(self) -> int:
        return (self.need("input_size") // self.need("patch_size")) ** 2

    @property
    def out_channels(self) -> int:
        return self.need("in_channels") * (2 if self.learn_sigma else 1)

    def footprint(self) -> Footprint:
        d, h, depth, tokens = self.need("width"), self.need("mlp_hidden"), self.need("depth"), self.tokens
        pixels = self.need("patch_size") ** 2
        # Linears by (inputs, outputs): those that every token meets, and those that every sample meets once.
        per_token = [(self.need("in_channels") * pixels, d), (d, self.out_channels * pixels)]
        per_token += depth * [(d, 3 * d), (d, d)] + self.dense_blocks * [(d, h), (h, d)]
        per_sample = [(FREQUENCIES, d), (d, d), (d, 2 * d)] + depth * [(d, 6 * d)]
        weights = sum(i * o for i, o in per_token), sum(i * o for i, o in per_sample)
        biases = sum(o for _, o in per_token + per_sample)
        experts = self.expert_weights()
        bare = tokens * d + (self.need("num_classes") + 1) * d + experts.scalars  # these tables cost no FLOPs
        bare += depth * 2 * (d // self.need("heads")) if self.qk_norm else 0
        everywhere = sum(weights) + biases + bare + experts.always
        attention = depth * 2 * tokens**2 * d  # multiply-adds of QKᵀ and of its product with V
        return Footprint(
            total_params=int(everywhere + experts.routed),
            active_params=everywhere + experts.active,
            forward_flops=2 * (tokens * (weights[0] + experts.always + experts.active) + weights[1] + attention),
        )
