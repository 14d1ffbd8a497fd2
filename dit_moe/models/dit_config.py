"""Names, shapes and predicted costs of Diffusion Transformers.

``DiT-S/2`` is dense, ``DiT-S/2-8E2A`` has 8 experts of which 2 are active on average, at the dense model's active
compute. The published sizes S, B, L and XL are those of DiT (Peebles & Xie 2023).

Size H is ours: ``DiT-H/2-64E8A`` has 3.4 B parameters of which 0.9 B are active, the scale of the DTop-p paper's
image model, whose exact width and depth are not published.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from dit_moe.config import ConfigError, require
from dit_moe.models.base import Footprint
from dit_moe.moe import MoEConfig

FREQUENCIES = 256  # width of the sinusoidal timestep embedding


@dataclass(frozen=True)
class Shape:
    depth: int
    width: int
    heads: int
    mlp_hidden: int


SIZES = {
    "S": Shape(12, 384, 6, 1536),
    "B": Shape(12, 768, 12, 3072),
    "L": Shape(24, 1024, 16, 4096),
    "XL": Shape(28, 1152, 16, 4608),
    "H": Shape(27, 1408, 22, 4672),  # 4672 / 8 = 584 is the hidden width of a 64E8A expert
}
_NAME = re.compile(r"DiT-(?P<size>[A-Za-z]+)/(?P<patch>[1-9]\d*)(-(?P<experts>[1-9]\d*)E(?P<target>\d+(\.\d+)?)A)?")


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """A Diffusion Transformer.

    `name` is ``DiT-<size>/<patch>`` with an optional ``-<experts>E<active>A``. It decides the fields marked (name),
    which a config may repeat but not contradict; with the size ``custom`` it must give them. The fields marked (data)
    follow from the data and the objective when they are left out.
    """

    name: str
    depth: int | None = None  # (name) transformer blocks
    width: int | None = None  # (name) D
    heads: int | None = None  # (name)
    mlp_hidden: int | None = None  # (name) hidden width of a dense feed-forward; custom: 4·width
    patch_size: int | None = None  # (name)
    in_channels: int | None = None  # (data) channels of a latent
    input_size: int | None = None  # (data) height and width of a latent
    num_classes: int | None = None  # (data) the null class of guidance has this index
    learn_sigma: bool | None = None  # (data) 2·in_channels outputs
    moe: MoEConfig | None = None  # experts; a name with a suffix and no section gets the defaults
    qk_norm: bool = False  # RMS-normalise queries and keys: steadier beyond 2 M steps and in low precision
    recompute: bool = False  # recompute each block's activations in the backward pass: slower, far less memory

    def __post_init__(self) -> None:
        match = _NAME.fullmatch(self.name)
        sizes = ", ".join([*SIZES, "custom"])
        require(match is not None, self, "name", f"is not DiT-<size>/<patch>[-<experts>E<active>A]; sizes: {sizes}")
        assert match is not None
        size = match["size"]
        require(size in SIZES or size == "custom", self, "name", f"has the unknown size {size}; sizes: {sizes}")
        self._settle("patch_size", int(match["patch"]))
        if size in SIZES:
            for field, value in vars(SIZES[size]).items():
                self._settle(field, value)
        for field in ("depth", "width", "heads"):
            require(getattr(self, field) is not None, self, field, f"must be given, since {self.name} names no size")
        if self.mlp_hidden is None:
            self._settle("mlp_hidden", 4 * self.need("width"))
        self._settle_experts(match)
        self._check()

    def _settle(self, field: str, value: object) -> None:
        given = getattr(self, field)
        require(given in (None, value), self, field, f"contradicts name={self.name}, which has {value}; drop one")
        object.__setattr__(self, field, value)

    def _settle_experts(self, match: re.Match[str]) -> None:
        """Give the experts of the name's suffix to the section `moe`, or see that the section has its own."""
        moe = self.moe
        if match["experts"]:
            moe = moe or MoEConfig()
            named = {"experts": int(match["experts"]), "target": float(match["target"])}
            for field, value in named.items():
                given = getattr(moe, field)
                if given not in (0, value):
                    raise ConfigError(f"moe.{field}", f"={given:g} contradicts name={self.name}; drop one")
            try:
                moe = replace(moe, **named)  # type: ignore[arg-type]
            except ConfigError as error:
                raise error.below("moe") from None
        if moe is not None and not (moe.experts and moe.target):
            field = "target" if moe.experts else "experts"
            raise ConfigError(f"moe.{field}", f" is missing; give it, or a name such as {self.name}-8E2A")
        object.__setattr__(self, "moe", moe)

    def _check(self) -> None:
        for field in ("depth", "width", "heads", "mlp_hidden", "in_channels", "input_size"):
            value = getattr(self, field)
            require(value is None or value >= 1, self, field, "must be at least 1")
        require(self.num_classes is None or self.num_classes >= 1, self, "num_classes", "must be at least 1")
        require(self.need("width") % self.need("heads") == 0, self, "width", f"is not a multiple of heads={self.heads}")
        require(self.need("width") % 4 == 0, self, "width", "must be a multiple of 4 for the 2-D position embedding")
        if self.moe is not None:
            self._check_experts(self.moe)
        if self.input_size is not None:
            patch = self.need("patch_size")
            wanted = f"does not divide input_size={self.input_size}; choose a patch size that does"
            require(self.input_size % patch == 0, self, "patch_size", wanted)

    def _check_experts(self, moe: MoEConfig) -> None:
        if not any(map(self.has_experts, range(self.need("depth")))):
            wanted = f"leaves no block of depth={self.depth} with experts; lower it"
            raise ConfigError("moe.offset", f"={moe.offset} {wanted}")
        if moe.implementation == "grouped":  # rows of 16 bytes, in bf16 too
            hidden = moe.hidden(self.need("mlp_hidden"))
            for field, value in (("width", self.need("width")), ("moe.expert_hidden", hidden)):
                if value % 8:
                    raise ConfigError(field, f"={value} must be a multiple of 8 for grouped matrix products")

    def need(self, field: str) -> int:
        """The value of a field that may still be unsettled; ConfigError if it is."""
        value = getattr(self, field)
        if value is None:
            raise ConfigError(field, " is missing; it comes from the data, or give it in the config")
        return int(value)

    # ------------------------------------------------------------------------------------------- what follows from it

    @property
    def tokens(self) -> int:
        """Tokens of one sample."""
        return (self.need("input_size") // self.need("patch_size")) ** 2

    @property
    def out_channels(self) -> int:
        return self.need("in_channels") * (2 if self.learn_sigma else 1)

    def has_experts(self, block: int) -> bool:
        return self.moe is not None and self.moe.is_moe(block)

    def footprint(self) -> Footprint:
        """Parameters and FLOPs, predicted; tests hold them against built modules."""
        return _footprint(self)


def _footprint(c: DiTConfig) -> Footprint:
    d, depth, tokens = c.need("width"), c.need("depth"), c.tokens
    pixels = c.need("patch_size") ** 2
    # Linears by (inputs, outputs): those that every token meets, and those that every sample meets once.
    per_token = [(c.need("in_channels") * pixels, d), (d, c.out_channels * pixels)]
    per_sample = [(FREQUENCIES, d), (d, d), (d, 2 * d)]
    bare = tokens * d + (c.need("num_classes") + 1) * d  # position and label tables cost no FLOPs
    routed = active = always = 0.0  # matrices without bias: all routed experts, the active ones, routers and shared
    for block in range(depth):
        per_token += [(d, 3 * d), (d, d)]
        per_sample += [(d, 6 * d)]
        bare += 2 * (d // c.need("heads")) if c.qk_norm else 0
        if c.moe is None or not c.has_experts(block):
            per_token += [(d, c.need("mlp_hidden")), (c.need("mlp_hidden"), d)]
            continue
        expert = (3 if c.moe.activation == "swiglu" else 2) * d * c.moe.hidden(c.need("mlp_hidden"))
        routed += c.moe.experts * expert
        active += c.moe.target * expert
        always += c.moe.experts * d + c.moe.shared_experts * expert
        bare += 1 if c.moe.router.drn else 0
    weights = sum(i * o for i, o in per_token), sum(i * o for i, o in per_sample)
    biases = sum(o for _, o in per_token + per_sample)
    everywhere = sum(weights) + biases + bare + always
    attention = depth * 2 * tokens**2 * d  # multiply-adds of QKᵀ and of its product with V
    return Footprint(
        total_params=int(everywhere + routed),
        active_params=everywhere + active,
        forward_flops=2 * (tokens * (weights[0] + always + active) + weights[1] + attention),
    )
