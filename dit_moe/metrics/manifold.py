"""Fidelity and diversity apart: precision and recall, density and coverage, of manifolds made of neighbours' balls."""

# N samples, M references, D feature width, K neighbours, A rows of a tile, B rows of the other tile

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dit_moe.config import require
from dit_moe.metrics.base import METRICS, FeatureSet, Metric
from dit_moe.metrics.neighbours import TILE, check_sets, nearest_distances, squared_distances


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: of samples inside the reference's manifold, and of references inside the samples'."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Balls of the reference that a sample lies in, per k (1 for equal distributions), and the share that hold one."""

    density: float
    coverage: float


def precision_recall(
    samples_ND: Tensor,
    reference_MD: Tensor,
    k: int = 3,
    tile: int = TILE,
    device: torch.device | str = "cpu",
    radii: tuple[Tensor, Tensor] | None = None,
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    A set's manifold is the union of closed balls around its points, each up to its k-th nearest other point; on the
    border is inside, and so is what rounding cannot tell from it. Both values depend on both counts. `radii`: of
    samples and reference, `squared_radii`, if they are known. Memory is O(tile² + tile·D). Raises ValueError for widths
    that differ, NaN, infinity, and unless 1 <= k < N, M.
    """
    check_sets(samples_ND, reference_MD)
    sets = samples_ND, reference_MD
    ours_N, theirs_M = (r.to(device) for r in radii or [squared_radii(rows, k, tile, device)[:, -1] for rows in sets])
    inside_N = torch.zeros(len(samples_ND), dtype=torch.bool, device=device)
    inside_M = torch.zeros(len(reference_MD), dtype=torch.bool, device=device)
    for a, b, squared_AB, error_AB in squared_distances(samples_ND, reference_MD, tile, device):
        inside_N[a] |= (squared_AB <= theirs_M[b] + error_AB).any(1)
        inside_M[b] |= (squared_AB <= ours_N[a, None] + error_AB).any(0)
    return PrecisionRecall(inside_N.double().mean().item(), inside_M.double().mean().item())


def density_coverage(
    samples_ND: Tensor,
    reference_MD: Tensor,
    k: int = 5,
    tile: int = TILE,
    device: torch.device | str = "cpu",
    radii: Tensor | None = None,
) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020), with open balls as in its authors' code.

    Rounding counts as outside, so a set against itself has the density 1 to the last digit, unless it repeats points.
    `radii`: the reference's `squared_radii`, if they are known. Memory and errors as of `precision_recall`, but that k
    may exceed the number of samples.
    """
    check_sets(samples_ND, reference_MD)
    radii_M = (squared_radii(reference_MD, k, tile, device)[:, -1] if radii is None else radii).to(device)
    balls, covered_M = 0, torch.zeros(len(reference_MD), dtype=torch.bool, device=device)
    for _, b, squared_AB, error_AB in squared_distances(samples_ND, reference_MD, tile, device):
        inside_AB = squared_AB < radii_M[b] - error_AB
        balls += int(inside_AB.sum())
        covered_M[b] |= inside_AB.any(0)
    return DensityCoverage(balls / (k * len(samples_ND)), covered_M.double().mean().item())


def check_neighbours(k: int, count: int) -> None:
    """ValueError unless 1 <= k < count."""
    if not 1 <= k < count:
        found = f"k={k} nearest neighbours in a set of {count} images"
        raise ValueError(f"{found}; k must be below their number: give more, or leave the metric out of --metrics")


def squared_radii(rows_ND: Tensor, k: int, tile: int = TILE, device: torch.device | str = "cpu") -> Tensor:
    """Squared distances of each row to its k nearest other rows, [N, K] in float64, ascending.

    Exact but for the rounding of `dim` additions, so that duplicates are at distance 0. ValueError for NaN, infinity,
    and unless 1 <= k < N.
    """
    check_neighbours(k, len(rows_ND))
    return nearest_distances(rows_ND, rows_ND, k + 1, tile, device)[:, 1:].square()  # the first is itself, or as near


# ------------------------------------------------------------------------------------------------------- the metrics

MOST = 5  # neighbours that are looked up in any case, so that both metrics and every sampling seed share them


def _radii(of: FeatureSet, k: int, device: torch.device | str) -> Tensor:
    """The k-th column of `squared_radii`, which the set keeps: it takes longest, and no device changes it."""
    known_NK = of.kept.get("squared_radii_NK")
    if known_NK is None or known_NK.shape[1] < k:
        features_ND = of.finite("features_ND")
        try:
            known_NK = squared_radii(features_ND, max(k, min(MOST, len(features_ND) - 1)), device=device)
        except ValueError as error:
            raise ValueError(f"{of.source}: {error}") from None
        of.kept["squared_radii_NK"] = known_NK
    return known_NK[:, k - 1]


@dataclass(frozen=True, kw_only=True)
class ManifoldConfig:
    """What both metrics have."""

    k: int  # the radius of a ball is the distance to the k-th nearest other point

    def __post_init__(self) -> None:
        require(self.k >= 1, self, "k", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class PrecisionRecallConfig(ManifoldConfig):
    """Improved precision and recall."""

    k: int = 3


@METRICS.register("precision_recall", PrecisionRecallConfig)
class PrecisionRecallMetric(Metric):
    """`precision` and `recall`."""

    config: PrecisionRecallConfig
    values = ("precision", "recall")
    better = "higher"

    def __call__(self, samples: FeatureSet, reference: FeatureSet) -> dict[str, float]:
        k, device = self.config.k, self.device
        features = samples.finite("features_ND"), reference.finite("features_ND")
        radii = _radii(samples, k, device), _radii(reference, k, device)
        return precision_recall(*features, k, device=device, radii=radii)._asdict()

    def check(self, samples: int, reference: int | None) -> None:
        check_neighbours(self.config.k, samples if reference is None else min(samples, reference))


@dataclass(frozen=True, kw_only=True)
class DensityCoverageConfig(ManifoldConfig):
    """Density and coverage."""

    k: int = 5


@METRICS.register("density_coverage", DensityCoverageConfig)
class DensityCoverageMetric(Metric):
    """`density` and `coverage`."""

    config: DensityCoverageConfig
    values = ("density", "coverage")
    better = "higher"

    def __call__(self, samples: FeatureSet, reference: FeatureSet) -> dict[str, float]:
        k, device = self.config.k, self.device
        features = samples.finite("features_ND"), reference.finite("features_ND")
        return density_coverage(*features, k, device=device, radii=_radii(reference, k, device))._asdict()

    def check(self, samples: int, reference: int | None) -> None:
        if reference is not None:
            check_neighbours(self.config.k, reference)
