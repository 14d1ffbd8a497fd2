"""Kernel distance between two sets of features (KID where they are Inception's), unbiased at any number of images."""

# N samples, M references, D feature width, S rows of a subset

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dit_moe.config import require
from dit_moe.metrics.base import METRICS, FeatureSet, Metric
from dit_moe.metrics.neighbours import check_sets

SUBSET = 1000  # Bińkowski et al. 2018
SEED = 2020  # torch-fidelity's, whose subsets these are


class KernelDistance(NamedTuple):
    """Squared maximum mean discrepancy: mean over subsets and standard deviation between them. It may be below 0."""

    mean: float
    std: float


def checked_subset_size(size: int | None, n: int, m: int) -> int:
    """`size`, or if it is None 1000, or all of the smaller set if it has fewer. ValueError unless 2 <= size <= n, m."""
    size = min(SUBSET, n, m) if size is None else size
    found = f"KID subsets of {size} images, of {n} samples and {m} references"
    if size > min(n, m):
        raise ValueError(f"{found}; lower --kid-subset-size to at most {min(n, m)}, or give more images")
    if size < 2:
        raise ValueError(f"{found}; it needs at least 2 images, or leave kid out of --metrics")
    return size


def kernel_distance(
    samples_ND: Tensor,
    reference_MD: Tensor,
    subsets: int = 100,
    subset_size: int | None = None,
    device: torch.device | str = "cpu",
) -> KernelDistance:
    """Unbiased MMD² with the kernel (x·y/D + 1)³ (Bińkowski et al. 2018), in float64.

    Subsets are drawn without replacement, as torch-fidelity draws them. `subset_size` None: 1000, or all of the smaller
    set. Memory is that of one subset. The std says nothing unless subsets are small beside N and M.
    Raises ValueError for widths that differ, NaN, infinity, and unless 2 <= subset_size <= N, M.
    """
    check_sets(samples_ND, reference_MD)
    size = checked_subset_size(subset_size, len(samples_ND), len(reference_MD))
    random = np.random.RandomState(SEED)  # the old generator: torch-fidelity's subsets are its
    distances = []
    for _ in range(subsets):
        x_SD, y_SD = (rows[random.choice(len(rows), size, replace=False)] for rows in (samples_ND, reference_MD))
        distances.append(_unbiased(x_SD.to(device, torch.float64), y_SD.to(device, torch.float64)))
    return KernelDistance(float(np.mean(distances)), float(np.std(distances)))


def _unbiased(x_SD: Tensor, y_SD: Tensor) -> float:
    """MMD² of two sets of equal size; pairs of a point with itself are left out (Gretton et al. 2012, Eq. 3)."""
    size, dim = x_SD.shape
    within = sum(_kernel(a @ a.T, dim).sum() - _kernel(a.square().sum(1), dim).sum() for a in (x_SD, y_SD))
    return (within / (size * (size - 1)) - 2 * _kernel(x_SD @ y_SD.T, dim).mean()).item()


def _kernel(products: Tensor, dim: int) -> Tensor:
    return (products / dim + 1) ** 3


def _overlap(size: int, n: int, m: int) -> bool:
    """Whether subsets share so many images that the spread between them says nothing."""
    return size > min(n, m) / 2


@dataclass(frozen=True, kw_only=True)
class KIDConfig:
    """Kernel distance over subsets."""

    subsets: int = 100
    subset_size: int | None = None  # None: 1000, or all of the smaller set if it has fewer

    def __post_init__(self) -> None:
        require(self.subsets >= 1, self, "subsets", "must be at least 1")
        require(self.subset_size is None or self.subset_size >= 2, self, "subset_size", "must be at least 2")


@METRICS.register("kid", KIDConfig)
class KID(Metric):
    """`kid` and, unless a subset is over half of a set, `kid_subset_std`."""

    config: KIDConfig
    values = ("kid", "kid_subset_std")

    def __call__(self, samples: FeatureSet, reference: FeatureSet) -> dict[str, float]:
        x_ND, y_MD = samples.finite("features_ND"), reference.finite("features_ND")
        mean, std = kernel_distance(x_ND, y_MD, self.config.subsets, self.config.subset_size, self.device)
        size = checked_subset_size(self.config.subset_size, len(x_ND), len(y_MD))
        return {"kid": mean} if _overlap(size, len(x_ND), len(y_MD)) else {"kid": mean, "kid_subset_std": std}

    def check(self, samples: int, reference: int | None) -> None:
        checked_subset_size(self.config.subset_size, samples, samples if reference is None else reference)

    def notes(self, samples: FeatureSet, reference: FeatureSet) -> list[str]:
        counts = [len(each.features_ND) for each in (samples, reference) if each.features_ND is not None]
        n, m = min(counts), max(counts)
        size, notes = checked_subset_size(self.config.subset_size, n, m), list[str]()
        if self.config.subset_size is None and size == n < SUBSET:
            return [f"of all {n} images, so without a spread; published ones are means over subsets of {SUBSET}"]
        if size != SUBSET:
            notes.append(f"KID over subsets of {size} images; published ones have {SUBSET}")
        if _overlap(size, n, m):
            remedy = f"for one, set --kid-subset-size to at most {n // 2}" if n >= 4 else "for one, give more images"
            notes.append(f"no kid_subset_std: subsets of {size} of {n} images are much the same; {remedy}")
        return notes

    def settings(self) -> dict[str, Any]:
        """`subset_size` is null where the counts decide; `notes` say what they decide."""
        return {"kernel": "(x·y/d + 1)^3", **super().settings(), "seed": SEED}
