"""Numbers drawn from the statistics, and which part of much to show."""

# L layers, E experts, X classes or noise levels

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RARE = 0.1  # of an even share; of an expert used less there is too little to tell


def some_layers(count: int, most: int) -> list[int]:
    """Indices of at most `most` layers, evenly from the first to the last."""
    return list(range(count)) if count <= most else [round(i) for i in np.linspace(0, count - 1, most)]


def extremes(values: np.ndarray, most: int) -> list[int]:
    """Indices by falling value; where there are more than `most`, its upper and its lower half of them."""
    order = np.argsort(-values, kind="stable").tolist()
    return order if len(order) <= most else order[: most // 2] + order[len(order) - most // 2 :]


def common(load_LE: np.ndarray) -> np.ndarray:
    """Which experts are used often enough to tell something of them."""
    return load_LE * load_LE.shape[-1] >= RARE


def relative_load(load_LXE: np.ndarray) -> np.ndarray:
    """How much oftener than on average over X each expert is used: 1 is as often; NaN for rare experts."""
    mean_L1E = load_LXE.mean(1, keepdims=True)
    return np.divide(load_LXE, mean_L1E, out=np.full_like(load_LXE, np.nan, dtype=float), where=common(mean_L1E))


def divergence(load_LXE: np.ndarray) -> np.ndarray:
    """Bits [L, X] by which each class's, or noise level's, load of experts diverges from the average one (Kullback)."""
    mean_LXE = np.broadcast_to(load_LXE.mean(1, keepdims=True), load_LXE.shape)
    ratio_LXE = np.divide(load_LXE, mean_LXE, out=np.ones_like(load_LXE, dtype=float), where=load_LXE > 0)
    return (load_LXE * np.log2(ratio_LXE)).sum(2)


def specialisation(load_LXE: np.ndarray) -> np.ndarray:
    """Bits that a routed pair's expert tells of its class or noise level, all equally likely, by layer [L].

    The Jensen-Shannon divergence of the loads: 0 where the experts are the same for all, at most `most_bits`.
    """
    return divergence(load_LXE).mean(1)


def most_bits(load_LXE: np.ndarray) -> float:
    """The most that `specialisation` can be: all that there is to tell, or all that so many experts can tell."""
    return math.log2(min(load_LXE.shape[1:]))


def lift(together_EE: np.ndarray) -> np.ndarray:
    """How much oftener than their loads make it two experts share a token; NaN on the diagonal and for rare experts.

    1 is neutral for every router: independent choices, scaled to as many pairs of experts as the layer's tokens have.
    Top-2 of 8 experts without any preference has 4/7 of the pairs of independent choices, as no token has 0 or 8.
    """
    use_E = np.diagonal(together_EE)
    told_E = common(use_E / use_E.sum())
    expected_EE = np.outer(use_E, use_E)
    apart_EE = ~np.eye(len(use_E), dtype=bool)
    if expected_EE[apart_EE].sum() > 0:
        expected_EE *= together_EE[apart_EE].sum() / expected_EE[apart_EE].sum()
    lift_EE = np.divide(
        together_EE,
        expected_EE,
        out=np.full(expected_EE.shape, np.nan),
        where=np.outer(told_E, told_E) & (expected_EE > 0),
    )
    np.fill_diagonal(lift_EE, np.nan)
    return lift_EE


def neighbours_first(lift_EE: np.ndarray) -> list[int]:
    """An order of experts in which those often used together stand side by side (spectral seriation)."""
    near_EE = np.nan_to_num(lift_EE)
    laplacian_EE = np.diag(near_EE.sum(1)) - near_EE
    return np.argsort(np.linalg.eigh(laplacian_EE)[1][:, 1], kind="stable").tolist()


def windows(curves: Sequence[np.ndarray], most: int = 240) -> list[np.ndarray]:
    """Curves over the same steps [..., U] as means over so many steps that at most `most` points are left."""
    length = -(-curves[0].shape[-1] // most)
    starts = np.arange(0, curves[0].shape[-1], length)
    counts = np.diff([*starts, curves[0].shape[-1]])
    return [np.add.reduceat(curve, starts, axis=-1) / counts for curve in curves]
