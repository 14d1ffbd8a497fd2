"""What every family of models has in common: the registry, its config's rules, its blocks, its predicted size."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_moe.config import ConfigError, require
from dit_moe.moe import MATRICES, Activation, MoEConfig, routers_of
from dit_moe.moe.experts import Implementation, fastest
from dit_moe.registry import Registry

MODELS = Registry("model")
Aux = dict[str, Tensor]
DEEPEST = 4096  # blocks


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Size and cost of a model, predicted from its config without building it."""

    total_params: int
    active_params: float  # parameters that a token meets on average when the routers are at their target
    forward_flops: float  # of one sample at the target; a multiply-add counts 2


@dataclass(frozen=True)
class Shape:
    """What a named size stands for."""

    depth: int
    width: int
    heads: int
    mlp_hidden: int


@dataclass(frozen=True)
class ExpertWeights:
    """Elements of the feed-forwards of all MoE blocks together."""

    routed: float = 0  # matrices of all routed experts …
    active: float = 0  # … and of those that are active on average
    always: float = 0  # matrices that every token meets: routers, shared experts
    scalars: float = 0  # all else that a token meets …
    idle_biases: float = 0  # … and the biases of the routed experts that are not active


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What the config of every transformer has. `name` decides the fields marked (name).

    A config may repeat those but not contradict them; with the size ``custom`` it must give them. Fields marked (data)
    follow from the data when they are left out.
    """

    NAME: ClassVar[re.Pattern[str]]  # with groups size, experts, target
    FORM: ClassVar[str]  # the pattern in words
    SIZES: ClassVar[Mapping[str, Shape]]
    KIND: ClassVar[Literal["images", "text"]]  # what it is trained on, which decides the other sections of a config

    name: str
    depth: int | None = None  # (name) transformer blocks
    width: int | None = None  # (name) D
    heads: int | None = None  # (name)
    mlp_hidden: int | None = None  # (name) hidden width of a dense feed-forward; custom: 4·width
    moe: MoEConfig | None = None  # experts; a name with a suffix and no section gets the defaults
    recompute: bool = False  # recompute each block's activations in the backward pass: slower, far less memory

    def _resolve_name(self) -> re.Match[str]:
        """Fill in what the name decides; ConfigError if it cannot be read, or for a contradiction."""
        match = self.NAME.fullmatch(self.name)
        sizes = ", ".join([*self.SIZES, "custom"])
        require(match is not None, self, "name", f"is not {self.FORM}; sizes: {sizes}")
        assert match is not None
        size = match["size"]
        require(size in self.SIZES or size == "custom", self, "name", f"has the unknown size {size}; sizes: {sizes}")
        if size in self.SIZES:
            shape = self.SIZES[size]
            for field, value in vars(replace(shape, mlp_hidden=self._hidden(shape.mlp_hidden))).items():
                self._resolve(field, value)
        for field in ("depth", "width", "heads"):
            require(getattr(self, field) is not None, self, field, f"must be given, since {self.name} names no size")
        if self.mlp_hidden is None:
            self._resolve("mlp_hidden", self._hidden(4 * self.need("width")))
        self._resolve_experts(match)
        return match

    def _hidden(self, hidden: int) -> int:
        """Hidden width of a dense feed-forward where the name, or 4·width, says `hidden`."""
        return hidden

    def _resolve(self, field: str, value: object) -> None:
        given = getattr(self, field)
        require(given in (None, value), self, field, f"contradicts name={self.name}, which has {value}; drop one")
        object.__setattr__(self, field, value)

    def _resolve_experts(self, match: re.Match[str]) -> None:
        """Give the experts of the name's suffix to the section `moe`, or see that the section has its own."""
        moe = self.moe
        if match["experts"]:
            moe = moe or MoEConfig()
            named = {"experts": int(match["experts"]), "target": float(match["target"])}
            for field, value in named.items():
                given = getattr(moe, field)
                if given not in (None, value):
                    raise ConfigError(f"moe.{field}", f"={given:g} contradicts name={self.name}; drop one")
            try:
                moe = replace(moe, **named)  # type: ignore[arg-type]
            except ConfigError as error:
                raise error.below("moe") from None
        if moe is not None and None in (moe.experts, moe.target):
            field = "experts" if moe.experts is None else "target"
            raise ConfigError(f"moe.{field}", f" is missing; give it, or a name such as {self.name}-8E2A")
        if moe is not None:
            moe = replace(moe, activation=moe.activation or self.activation)
        object.__setattr__(self, "moe", moe)

    def _check_blocks(self) -> None:
        """ConfigError for sizes that no block can have."""
        for field in ("depth", "width", "heads", "mlp_hidden"):
            require(self.need(field) >= 1, self, field, "must be at least 1")
        require(self.need("depth") <= DEEPEST, self, "depth", f"must be at most {DEEPEST}")
        require(self.need("width") % self.need("heads") == 0, self, "width", f"is not a multiple of heads={self.heads}")
        moe = self.moe
        if moe is None:
            return
        if not any(map(self.has_experts, range(self.need("depth")))):
            wanted = f"leaves no block of depth={self.depth} with experts; lower it"
            raise ConfigError("moe.offset", f"={moe.offset} {wanted}")
        if moe.implementation in ("auto", "grouped"):  # rows of 16 bytes, in bf16 too
            for field, value in (("width", self.need("width")), ("moe.expert_hidden", self.expert_hidden)):
                if value % 8:
                    raise ConfigError(field, f"={value} must be a multiple of 8 for grouped matrix products")

    def need(self, field: str) -> int:
        """The value of a field that may still be unresolved; ConfigError if it is."""
        value = getattr(self, field)
        if value is None:
            raise ConfigError(field, " is missing; it comes from the data, or give it in the config")
        return int(value)

    # ------------------------------------------------------------------------------------------- what follows from it

    @property
    def activation(self) -> Activation:
        """Of a dense feed-forward, and of an expert unless the section `moe` says otherwise."""
        raise NotImplementedError

    @property
    def tokens(self) -> int:
        """Tokens of one sample."""
        raise NotImplementedError

    def footprint(self) -> Footprint:
        """Parameters and FLOPs, predicted; tests hold them against built modules."""
        raise NotImplementedError

    def has_experts(self, block: int) -> bool:
        return self.moe is not None and self.moe.is_moe(block)

    @property
    def expert_hidden(self) -> int:
        """Hidden width of one expert; only with experts."""
        assert self.moe is not None
        return self.moe.hidden(self.need("mlp_hidden"), self.activation)

    @property
    def shared_width(self) -> int:
        """Hidden width of all shared experts together, 0 without; only with experts."""
        assert self.moe is not None
        return self.moe.shared_width(self.expert_hidden)

    def implementation(self, rows: int, device: str, dtype: torch.dtype) -> Implementation | None:
        """How the experts are computed on this machine's `device`; None without experts.

        Where `auto` decides by the size, a layer with more or fewer active experts than the target may take the other.

        Args:
            rows: samples of a forward pass.
            dtype: that of the products.
        """
        moe = self.moe
        if moe is None or moe.implementation != "auto":
            return None if moe is None else moe.implementation
        if moe.capacity_factor is not None:
            return "grouped"
        weights = MATRICES[moe.activation or self.activation] * self.need("width") * self.expert_hidden
        return fastest(device, dtype, round(rows * self.tokens * moe.target) * weights, moe.experts)

    @property
    def dense_blocks(self) -> int:
        """Blocks without experts."""
        return self.need("depth") - sum(map(self.has_experts, range(self.need("depth"))))

    def expert_weights(self) -> ExpertWeights:
        """Sizes of all MoE blocks together."""
        moe, blocks, width = self.moe, self.need("depth") - self.dense_blocks, self.need("width")
        if moe is None:
            return ExpertWeights()
        products, hidden, shared = MATRICES[moe.activation or self.activation], self.expert_hidden, self.shared_width
        expert = products * width * hidden
        bias, shared_bias = ((products - 1) * h + width if moe.bias and h else 0 for h in (hidden, shared))
        matrices, others = moe.router.size(moe.experts, width)
        return ExpertWeights(
            routed=blocks * moe.experts * expert,
            active=blocks * moe.target * expert,
            always=blocks * (matrices + products * width * shared),
            scalars=blocks * (others + shared_bias + moe.target * bias),
            idle_biases=blocks * (moe.experts - moe.target) * bias,
        )


class Transformer(nn.Module):
    """What the trainer needs of a model, beside its forward pass."""

    blocks: nn.ModuleList

    @property
    def aux_weights(self) -> dict[str, float]:
        """The coefficient of each auxiliary loss term that `forward` can return."""
        routers = routers_of(self)
        return routers[0].loss_weights() if routers else {}

    @property
    def wants_target(self) -> bool:
        """Whether `forward` is to be given the objective's target, as `target`, since a router learns from it."""
        return self.training and any(router.wants_target for router in routers_of(self))

    def modules_but_routers(self) -> Iterator[nn.Module]:
        """Those that a model initialises; routers bring their own."""
        inside = {module for router in routers_of(self) for module in router.modules()}
        return (module for module in self.modules() if module not in inside)

    @property
    def sharding_units(self) -> Iterable[nn.Module]:
        """The modules whose weights sharded data parallelism gathers as one, when their turn comes."""
        return self.blocks


class RMSNorm(nn.RMSNorm):
    """RMS norm in fp32, under autocast as LayerNorm is and of weights in any dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float() if self.weight is not None else None
        return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm in fp32 on every device, also under autocast and of weights in any dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(
            x.dtype
        )


def run_blocks(blocks: Iterable[nn.Module], x_BSD: Tensor, *args: Any, recompute: bool) -> tuple[Tensor, Aux]:
    """`x_BSD` through all blocks; returns the states, and the loss terms as means over the blocks that have them.

    A block is ``(states, what the router before handed on, *args) -> (states, loss terms, what its router hands on)``.
    """
    terms: dict[str, list[Tensor]] = defaultdict(list)
    handed_on_NE: Tensor | None = None
    for block in blocks:
        if recompute:
            x_BSD, aux, handed_on_NE = checkpoint(block, x_BSD, handed_on_NE, *args, use_reentrant=False)
        else:
            x_BSD, aux, handed_on_NE = block(x_BSD, handed_on_NE, *args)
        for name, term in aux.items():
            terms[name].append(term)
    return x_BSD, {name: torch.stack(values).mean() for name, values in terms.items()}
