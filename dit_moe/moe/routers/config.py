"""The options of every router, and what else follows from a router's config alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from dit_moe.config import ConfigError, require
from dit_moe.registry import Registry

ROUTERS = Registry("router")

Score = Literal["softmax", "sigmoid", "identity", "cosine"]
Sees = Literal["token", "sample", "batch"]


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Options of every router. A loss term `name` of a router is weighted by the option ``name_loss``."""

    ADJUSTABLE: ClassVar[Literal["p", "k"] | None] = None
    """What can be set anew in a trained router, so that a token uses more or fewer experts. With "p" the router is a
    `TopPRouter`."""
    SCORES: ClassVar[tuple[Score, ...]] = ("softmax",)
    """What `score` may be; empty if the router learns no scores: it has no weights, and its logits are 0."""
    MAY_SKIP: ClassVar[bool] = False
    """Whether a token may be left without an expert."""
    WAITS_FOR: ClassVar[str | None] = None
    """What the host has to learn from the device before it knows what to compute; None: nothing."""
    NEEDS_LABELS: ClassVar[bool] = False
    """Whether it routes by the class of a sample."""
    UNUSED: ClassVar[tuple[str, ...]] = ()
    """Options below that mean nothing to it, and so may not be set."""

    score: Score = "softmax"  # logits → what experts are ranked by and weighted with
    drn: bool = False  # dynamic routing normalization: standardised logits times a learnable scale
    # What the router reads: what the experts read, or the normalised token before the modulation by time and label, or
    # that and the embedding of the time beside it (NucleusMoE-Image).
    input: Literal["token", "unmodulated", "unmodulated_time"] = "token"
    init_std: float = 0.02  # of the router's weights
    # Gates of the chosen experts sum to 1; with False they are the raw scores. None: they sum to 1 unless a
    # token has one expert: its gate would be 1 whatever the router says, and the task could teach the router nothing.
    renormalize: bool | None = None
    gate_scale: float = 1.0  # factor of all gates, after that
    # Loss-free balancing: experts are ranked by score + bias, and after each step the bias of an expert with less than
    # the mean load grows by this much, that of one with more falls. Gates know nothing of it.
    bias_rate: float = 0.0
    min_experts: int = 1
    max_experts: int | None = None  # None: all
    balance_loss: float = 1e-4
    dynamic_loss: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        for option in self.UNUSED:
            given = getattr(self, option) != getattr(type(self), option)
            require(not given, self, option, "means nothing to this router; drop it")
        wanted = f"is none of {', '.join(self.SCORES)}, which this router can use"
        require(not self.SCORES or self.score in self.SCORES, self, "score", wanted)
        require(self.init_std >= 0, self, "init_std", "must be at least 0")
        require(self.gate_scale > 0, self, "gate_scale", "must be above 0")
        require(self.bias_rate >= 0, self, "bias_rate", "must be at least 0")
        require(self.min_experts >= 1, self, "min_experts", "must be at least 1")
        if self.max_experts is not None:
            require(
                self.max_experts >= self.min_experts, self, "max_experts", f"is below min_experts={self.min_experts}"
            )

    @property
    def sees(self) -> Sees:
        """What decides the experts of a token in training: the token itself, all tokens of its sample, or of the batch.

        In evaluation no router looks beyond the sample.
        """
        return "token"

    @property
    def held(self) -> bool:
        """Whether the mean of active experts is meant to be the target, which else only sizes the experts."""
        return True

    @property
    def controlled(self) -> bool:
        """Whether training holds the mean of active experts at the target by moving something."""
        return False

    def check(self, experts: int, target: float) -> None:
        """Raise ConfigError unless these options make sense for `experts` experts and a mean of `target` active."""
        for option in ("min_experts", "max_experts"):
            require((getattr(self, option) or 0) <= experts, self, option, f"exceeds experts={experts}")
        most = self.max_experts or experts
        if not self.min_experts <= target <= most:
            raise ConfigError("target", f"={target:g} is outside what the router allows, {self.min_experts} to {most}")

    def check_text(self) -> None:
        """Raise ConfigError unless a language model can have this router: a token must not depend on later ones."""
        name = ROUTERS.name_of(self)
        if self.sees != "token":
            seen = f"the other tokens of the {self.sees}"
            raise ConfigError(
                "name", f"={name} looks at {seen}, so a language model would see the future; choose dtopp"
            )
        if self.NEEDS_LABELS:
            raise ConfigError("name", f"={name} needs the classes of images, and text has none; choose dtopp")
        require(self.input == "token", self, "input", "is for images, whose blocks are told the time; drop it")

    def resolved(self, experts: int, target: float) -> Self:
        """With what is left open decided for `experts` experts and a mean of `target` active."""
        if self.renormalize is not None:
            return self
        return replace(self, renormalize=min(target, self.max_experts or experts) > 1)

    def for_patches(self, numbers: int) -> Self:
        """For a model whose tokens stand for patches of so many numbers."""
        return self

    def rows(self, experts: int) -> int:
        """How many scores a token has: one for each expert, and for what else a router chooses from."""
        return experts if self.SCORES else 0

    def input_width(self, width: int) -> int:
        """Width of what the router reads, beside tokens of `width`."""
        return 2 * width if self.input == "unmodulated_time" else width

    def size(self, experts: int, width: int) -> tuple[int, int]:
        """Parameters of a router: elements of matrices that every token meets, and all others."""
        return self.rows(experts) * self.input_width(width), int(self.drn)

    def saved(self, experts: int, width: int) -> float:
        """Bytes for each token that autograd keeps of a router: what it reads, its probabilities and losses."""
        if not self.SCORES:
            return 0
        numbers = self.input_width(width) * (2 if self.score == "cosine" else 1)  # once more as it is normalised
        return 4 * numbers + self.rows(experts) * (25 if self.drn else 21) + 16

    def peak(self, experts: int, target: float) -> float | None:
        """The largest mean of a step that training is to be ready for; None: the target.

        What steers a router follows it a step behind. 1.5 targets is about the most that the start of training showed:
        docs/controller.md.
        """
        return min(1.5 * target, self.max_experts or experts) if self.controlled else None

    def note(self, target: float, experts: int, tokens: int | None) -> str | None:
        """What a user should know before training with a mean of `target` of `experts` active; None: nothing unusual.

        `tokens` are those of a sample, if the model knows.
        """
        return None

    def remark(self, experts: int) -> str | None:
        """What a reader of a routing report should know, whose images all have their class; None: nothing unusual."""
        return None
