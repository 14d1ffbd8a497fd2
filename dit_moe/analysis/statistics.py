"""What is known about a network's routing: arrays that `images` or `text` counts, and numbers computed from them."""

# L MoE layers, E experts, T noise levels, C classes, S positions of a sample, M example images, W example tokens,
# V kinds of token, X classes, kinds of token or noise levels

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dit_moe.files import atomic_file, write_atomically
from dit_moe.json_files import read_object
from dit_moe.training.curves import RouterCurves

CLASS_IMAGES = 10
JSON, NPZ = "routing.json", "routing.npz"
SMALL = 50_000  # numbers of an array that goes into the JSON
DIGITS = 6  # significant ones, there
SAME = 1e-6  # experts, shares or bits that differ by less are the same, and a picture of them would show nothing
RARE = 0.1  # of an even share; of an expert used less there is too little to tell


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
class RoutingStats:
    """All of it. Means are over tokens; shares of experts are over routed (token, expert) pairs and sum to 1.

    Where no token uses an expert, as of a class that a router with null experts gives to these alone, the shares are
    NaN; the JSON has null. Arrays that make no sense for the kind of model, or were not asked for, are None.
    """

    kind: Literal["images", "text"]
    facts: dict[str, Any]  # run, step, model, router, weights, parameters, tokens counted, versions: for people
    layers_L: list[int]  # number of the block, counted from 0
    experts: int
    target: Target  # of the network as it ran; of several by layer or time their mean
    trained_target: Target
    adjustable: bool = True  # whether the network can be used with more, or fewer, experts
    remark: str | None = None  # what is peculiar to its routers
    active_L: np.ndarray  # mean active experts a token
    active_std_L: np.ndarray  # its standard deviation over tokens
    share_LE: np.ndarray  # share of tokens with exactly 1, 2, …, E active experts; the others have none
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
    training: RouterCurves | None = None

    @property
    def can_compare_classes(self) -> bool:
        """Whether there are classes, and images enough of each: differences of fewer are mostly those of images."""
        return self.images_C is not None and len(self.images_C) > 1 and bool(self.images_C.mean() >= CLASS_IMAGES)

    @property
    def active(self) -> float:
        """Mean active experts a token over all layers."""
        return float(self.active_L.mean())

    @property
    def balance_L(self) -> np.ndarray:
        """Entropy of each layer's load over that of an even one: 1 is balanced, 0 one of several experts.

        NaN for a layer of which no token uses an expert.
        """
        if self.experts == 1:
            return np.ones(len(self.layers_L))
        load_LE = np.clip(self.load_LE, 1e-12, None)
        return -(load_LE * np.log(load_LE)).sum(1) / np.log(self.experts)

    @property
    def effective_L(self) -> np.ndarray:
        """So many evenly used experts would have the entropy of each layer's load; 0 where no expert is used."""
        return np.nan_to_num(self.experts**self.balance_L)

    @property
    def even_load(self) -> bool:
        """Whether all of several experts get the same share of the pairs, in every layer."""
        return self.experts > 1 and bool(np.ptp(self.load_LE) < SAME)

    @property
    def fixed_number(self) -> float | None:
        """The number of experts that every token uses in every layer, if there is one."""
        same = np.ptp(self.active_L) < SAME and float(self.active_std_L.max()) < SAME
        return float(self.active_L[0]) if same else None


# --------------------------------------------------------------------------------------------- what the experts are for


def mean_known(values: np.ndarray, axis: int, keepdims: bool = False) -> np.ndarray:
    """The mean of the numbers that are not NaN; NaN where there are none."""
    known = ~np.isnan(values)
    count, total = (each.sum(axis, keepdims=keepdims) for each in (known, np.where(known, values, 0.0)))
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _common(load_LE: np.ndarray) -> np.ndarray:
    """Which experts are used often enough to tell something of them."""
    return load_LE * load_LE.shape[-1] >= RARE


def relative_load(load_LXE: np.ndarray) -> np.ndarray:
    """How much more often than on average over X each expert is used: 1 is as often.

    NaN for rare experts, and for a class or noise level that uses none.
    """
    mean_L1E = mean_known(load_LXE, 1, keepdims=True)
    return np.divide(load_LXE, mean_L1E, out=np.full_like(load_LXE, np.nan, dtype=float), where=_common(mean_L1E))


def divergence(load_LXE: np.ndarray) -> np.ndarray:
    """Bits [L, X] by which each class's, or noise level's, load of experts diverges from the average one (Kullback).

    NaN for one that uses none.
    """
    mean_LXE = np.broadcast_to(mean_known(load_LXE, 1, keepdims=True), load_LXE.shape)
    ratio_LXE = np.divide(load_LXE, mean_LXE, out=np.ones_like(load_LXE, dtype=float), where=load_LXE > 0)
    return (load_LXE * np.log2(ratio_LXE)).sum(2)


def specialisation(load_LXE: np.ndarray) -> np.ndarray:
    """Bits that a routed pair's expert tells of its class or noise level, all equally likely, by layer [L].

    The Jensen-Shannon divergence of the loads: 0 where the experts are the same for all, at most `most_bits`. Of those
    that use any; NaN for a layer where none does.
    """
    return mean_known(divergence(load_LXE), 1)


def most_bits(load_LXE: np.ndarray) -> float:
    """The most that `specialisation` can be: all that there is to tell, or all that so many experts can tell."""
    return math.log2(min(load_LXE.shape[1:]))


def lift(together_EE: np.ndarray) -> np.ndarray:
    """How much more often than their loads make it two experts share a token; NaN on the diagonal and for rare experts.

    1 is neutral for every router: independent choices, scaled to as many pairs of experts as the layer's tokens have.
    Top-2 of 8 experts without any preference has 4/7 of the pairs of independent choices, as no token has 0 or 8.
    """
    use_E = np.diagonal(together_EE)
    common_E = _common(use_E / max(use_E.sum(), 1e-12))
    expected_EE = np.outer(use_E, use_E)
    apart_EE = ~np.eye(len(use_E), dtype=bool)
    if expected_EE[apart_EE].sum() > 0:
        expected_EE *= together_EE[apart_EE].sum() / expected_EE[apart_EE].sum()
    lift_EE = np.divide(
        together_EE,
        expected_EE,
        out=np.full(expected_EE.shape, np.nan),
        where=np.outer(common_E, common_E) & (expected_EE > 0),
    )
    np.fill_diagonal(lift_EE, np.nan)
    return lift_EE


def neighbours_first(lift_EE: np.ndarray) -> list[int]:
    """An order of experts in which those often used together stand side by side (spectral seriation)."""
    near_EE = np.nan_to_num(lift_EE)
    laplacian_EE = np.diag(near_EE.sum(1)) - near_EE
    return np.argsort(np.linalg.eigh(laplacian_EE)[1][:, 1], kind="stable").tolist()


# ----------------------------------------------------------------------------------------------------------- the files


def write_stats(stats: RoutingStats, folder: Path, pictures: Sequence[str] = ()) -> None:
    """Write both files. Arrays keep their names, those of a part behind its own: ``examples.active_MTLS``.

    The JSON lists `pictures`, files in the same folder. Those that an earlier one lists, and this one does not, go.
    """
    arrays: dict[str, np.ndarray] = {}
    body = _plain(stats, "", arrays)
    body |= {"active": _rounded(stats.active), "balance_L": _rounded(stats.balance_L.tolist())}
    body[f"only in {NPZ}"] = [name for name, array in arrays.items() if not _goes_into_json(array)]
    body["pictures"] = list(pictures)
    text = json.dumps(body, allow_nan=False, ensure_ascii=False) + "\n"
    earlier = read_object(folder / JSON).get("pictures")
    for name in earlier if isinstance(earlier, list) else ():  # even of a damaged file, nothing but PNGs beside it
        if name not in pictures and isinstance(name, str) and Path(name).name == name and name.endswith(".png"):
            (folder / name).unlink(missing_ok=True)
    with atomic_file(folder / NPZ) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    write_atomically(folder / JSON, text)


def _plain(part: Any, path: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Ready for JSON, without large arrays and pictures; all arrays are added to `arrays`."""
    plain = {}
    for each in dataclasses.fields(part):
        value, name = getattr(part, each.name), path + each.name
        if isinstance(value, np.ndarray):
            arrays[name] = value
            if _goes_into_json(value):
                plain[each.name] = _rounded(value.tolist())
        else:
            plain[each.name] = _plain(value, f"{name}.", arrays) if dataclasses.is_dataclass(value) else value
    return plain


def _goes_into_json(array: np.ndarray) -> bool:
    return array.size <= SMALL and array.dtype != np.uint8


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
