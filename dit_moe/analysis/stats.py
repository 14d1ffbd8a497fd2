"""What is known about a network's routing: plain arrays, counted by `collect_images` or `collect_text`, then drawn."""

# L MoE layers, E experts, T noise levels, C classes, S positions of a sample, M example images, W example tokens,
# V kinds of token, U logged training steps

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

CLASS_IMAGES = 10


@dataclass(frozen=True)
class Target:
    """A mean number of active experts: what the routers are held to, or only what the experts' width is made for."""

    mean: float
    held: bool = True

    @property
    def name(self) -> str:
        return "target" if self.held else "nominal"

    def __str__(self) -> str:
        return f"{self.name} {self.mean:.4g}"


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Some held-out images, and where their tokens went at several noise levels."""

    times_T: np.ndarray  # of these, in [0, 1]; 1 is noise
    images_MHWC: np.ndarray  # uint8, the decoded images themselves
    noisy_MTHWC: np.ndarray  # uint8, decoded from what the network saw
    active_MTLS: np.ndarray  # active experts of every token; S is a square, row by row
    classes_M: list[str]


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A stretch of held-out text, token by token."""

    tokens_W: list[str]  # as they are, white space too; a byte that is no text by itself as "<C3>"
    active_LW: np.ndarray


@dataclass(frozen=True, kw_only=True)
class TokenKinds:
    """The most frequent tokens of the text and the experts they take."""

    tokens_V: list[str]  # most frequent first; what does not show by itself is spelt: "␣the", "↵", "<C3>"
    count_V: np.ndarray
    active_LV: np.ndarray
    load_LVE: np.ndarray | None = None  # share of the kind's pairs that each expert got


@dataclass(frozen=True, kw_only=True)
class Training:
    """The routers over training, from the run's log."""

    step_U: np.ndarray
    active_U: np.ndarray
    active_LU: np.ndarray
    p_LU: np.ndarray | None = None  # None: the routers steer no threshold
    theta_LU: np.ndarray | None = None  # None: no dynamic routing normalization


@dataclass(frozen=True, kw_only=True)
class RoutingStats:
    """All of it. Means are over tokens; shares of experts are over routed (token, expert) pairs and sum to 1.

    Arrays that make no sense for the kind of model, or were not asked for, are None.
    """

    kind: Literal["images", "text"]
    facts: dict[str, Any]  # run, step, model, router, weights, parameters, tokens counted, versions: for people
    layers_L: list[int]  # number of the block, counted from 0
    experts: int
    target: Target  # of the network as it ran; of several by layer or time their mean
    trained_target: Target
    active_L: np.ndarray  # mean active experts a token
    active_std_L: np.ndarray  # its standard deviation over tokens
    share_LE: np.ndarray  # share of tokens with exactly 1, 2, …, E active experts; rows sum to 1
    load_LE: np.ndarray  # share of the pairs that each expert got
    together_LEE: np.ndarray  # share of tokens that use experts i and j; on the diagonal, i at all
    active_LS: np.ndarray  # by position: of images a square of patches, row by row; of text bins, see `position_S`
    position_S: np.ndarray | None = None  # text: the first position of each bin, counted from 0; bins are as wide
    tokens_S: np.ndarray | None = None  # text: the tokens counted in each bin
    times_T: np.ndarray | None = None  # noise levels, 1 is noise
    active_LT: np.ndarray | None = None
    load_LTE: np.ndarray | None = None
    class_names_C: list[str] = field(default_factory=list)
    images_C: np.ndarray | None = None  # of each class
    active_LC: np.ndarray | None = None
    load_LCE: np.ndarray | None = None
    shuffled_LCE: np.ndarray | None = None  # the same with the labels shuffled over the images: what chance makes
    examples: Examples | None = None
    tokens: TokenKinds | None = None
    passage: Passage | None = None
    training: Training | None = None

    @property
    def tells_classes(self) -> bool:
        """Whether there are classes, and images enough of each: differences of fewer are mostly those of images."""
        return self.images_C is not None and len(self.images_C) > 1 and bool(self.images_C.mean() >= CLASS_IMAGES)

    @property
    def active(self) -> float:
        """Mean active experts a token over all layers."""
        return float(self.active_L.mean())

    @property
    def balance_L(self) -> np.ndarray:
        """Entropy of each layer's load over that of an even one: 1 is balanced, 0 one of several experts."""
        if self.experts == 1:
            return np.ones(len(self.layers_L))
        load_LE = np.clip(self.load_LE, 1e-12, None)
        return -(load_LE * np.log(load_LE)).sum(1) / np.log(self.experts)
