"""Fidelity and diversity apart: precision and recall, density and coverage, of manifolds made of neighbours' balls."""

# N samples, M references, D feature width, K neighbours, A rows of a tile, B rows of the other tile, P pairs

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dit_moe.config import require
from dit_moe.metrics.base import METRICS, FeatureSet, Metric
from dit_moe.metrics.neighbours import nearest_distances
from dit_moe.metrics.tiles import TILE, Tile, centre_of, check_sets, rounding, squared_distances, tiles

F64 = torch.float64
AT_ONCE = 2**22  # differences that are held at a time


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
    ours_N, theirs_M = radii or (_kth(samples_ND, k, tile, device), _kth(reference_MD, k, tile, device))
    ours_N, theirs_M = ours_N.to(device), theirs_M.to(device)
    inside_N = torch.zeros(len(samples_ND), dtype=torch.bool, device=device)
    inside_M = torch.zeros(len(reference_MD), dtype=torch.bool, device=device)
    for pairs in _pairs(samples_ND, reference_MD, tile, device):
        inside_N[pairs.a.rows] |= pairs.inside(theirs_M[pairs.b.rows], closed=True).any(1)
        inside_M[pairs.b.rows] |= pairs.inside(ours_N[pairs.a.rows, None], closed=True).any(0)
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
    radii_M = (_kth(reference_MD, k, tile, device) if radii is None else radii).to(device)
    balls, covered_M = 0, torch.zeros(len(reference_MD), dtype=torch.bool, device=device)
    for pairs in _pairs(samples_ND, reference_MD, tile, device):
        inside_AB = pairs.inside(radii_M[pairs.b.rows], closed=False)
        balls += int(inside_AB.sum())
        covered_M[pairs.b.rows] |= inside_AB.any(0)
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


def _kth(rows_ND: Tensor, k: int, tile: int, device: torch.device | str) -> Tensor:
    return squared_radii(rows_ND, k, tile, device)[:, -1]


class _Pairs:
    """The pairs of a tile of each set, of which it is told which are nearer than a radius."""

    def __init__(self, a: Tile, b: Tile, ours_ND: Tensor, theirs_MD: Tensor) -> None:
        self.a, self.b = a, b
        self.a_AD, self.b_BD = ours_ND[a.rows], theirs_MD[b.rows]  # as given: less a centre they have been rounded
        self.slack = rounding(ours_ND.shape[1], F64)
        self.squared_AB = squared_distances(a, b)
        self.error_AB = self.slack * (a.squares_A[:, None] + b.squares_A)

    def inside(self, radii: Tensor, closed: bool) -> Tensor:
        """[A, B]: whether the squared distance is below `radii`, squared and [B] or [A, 1], or equal if `closed`.

        Pairs that the rounding of products leaves open are compared by differences, whose error is a share of the
        distance alone. Within that share a distance counts as equal to the radius: so it is there that `closed` decides
        by the slack, and by `<=` or `<` only where the radius is 0, around repeated points.
        """
        compare = torch.le if closed else torch.lt
        limits_AB = (radii * (1 + self.slack if closed else 1 - self.slack)).expand_as(self.squared_AB)
        inside_AB = compare(self.squared_AB, limits_AB)
        i, j = ((self.squared_AB - limits_AB).abs_() <= self.error_AB).nonzero(as_tuple=True)
        at_once = max(1, AT_ONCE // self.a_AD.shape[1])
        for i_P, j_P in zip(i.split(at_once), j.split(at_once), strict=True):
            a_PD, b_PD = self.a_AD[i_P.cpu()].double(), self.b_BD[j_P.cpu()].double()
            exact_P = (a_PD - b_PD).square_().sum(1).to(i.device)
            inside_AB[i_P, j_P] = compare(exact_P, limits_AB[i_P, j_P])
        return inside_AB


def _pairs(ours_ND: Tensor, theirs_MD: Tensor, tile: int, device: torch.device | str) -> Iterator[_Pairs]:
    centre_D = centre_of(theirs_MD)
    for a in tiles(ours_ND, centre_D, tile, device, F64):
        for b in tiles(theirs_MD, centre_D, tile, device, F64):
            yield _Pairs(a, b, ours_ND, theirs_MD)


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
class PrecisionRecallConfig:
    """Improved precision and recall."""

    k: int = 3  # the radius of a ball is the distance to the k-th nearest other point

    def __post_init__(self) -> None:
        require(self.k >= 1, self, "k", "must be at least 1")


@METRICS.register("precision_recall", PrecisionRecallConfig)
class PrecisionRecallMetric(Metric):
    """`precision` and `recall`."""

    config: PrecisionRecallConfig
    better = "higher"

    def __call__(self, samples: FeatureSet, reference: FeatureSet) -> dict[str, float]:
        k, device = self.config.k, self.device
        features = samples.finite("features_ND"), reference.finite("features_ND")
        radii = _radii(samples, k, device), _radii(reference, k, device)
        return precision_recall(*features, k, device=device, radii=radii)._asdict()

    def check(self, samples: int, reference: int | None) -> None:
        for count in (samples, reference):
            if count is not None:
                check_neighbours(self.config.k, count)


@dataclass(frozen=True, kw_only=True)
class DensityCoverageConfig:
    """Density and coverage."""

    k: int = 5  # as above

    def __post_init__(self) -> None:
        require(self.k >= 1, self, "k", "must be at least 1")


@METRICS.register("density_coverage", DensityCoverageConfig)
class DensityCoverageMetric(Metric):
    """`density` and `coverage`."""

    config: DensityCoverageConfig
    better = "higher"

    def __call__(self, samples: FeatureSet, reference: FeatureSet) -> dict[str, float]:
        k, device = self.config.k, self.device
        features = samples.finite("features_ND"), reference.finite("features_ND")
        return density_coverage(*features, k, device=device, radii=_radii(reference, k, device))._asdict()

    def check(self, samples: int, reference: int | None) -> None:
        if reference is not None:
            check_neighbours(self.config.k, reference)
