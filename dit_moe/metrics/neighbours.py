"""Distances to nearest neighbours: samples much nearer to the training images than held-out ones are were memorised."""

# N queries, M references, D feature width, K neighbours, C candidates, A queries of a tile, B references of a tile

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_moe.metrics.base import METRICS, FeatureSet, Metric
from dit_moe.metrics.finite import is_finite
from dit_moe.metrics.tiles import (
    TILE,
    TOO_LARGE,
    Tile,
    centre_of,
    check_sets,
    rounding,
    squared_distances,
    tiles,
)
from dit_moe.precision import full_precision

SPARE = 7  # candidates beyond k: the more, the fewer queries whose nearest rounding leaves open
ROWS = 64  # queries whose candidates are held at a time


def nearest_distances(
    queries_ND: Tensor, references_MD: Tensor, k: int = 1, tile: int = TILE, device: torch.device | str = "cpu"
) -> Tensor:
    """Euclidean distances of each query to its k nearest references, [N, K] in float64, ascending.

    Candidates are found by products of matrices, in float32; the distances to them are then taken by differences in
    float64, so that a copy is at distance 0 exactly. Queries whose candidates might, for all that rounding allows, lack
    one of the nearest are searched again in float64, and by differences if need be: the result is always exact.
    Memory is O(tile² + tile·D) whatever N and M are. Raises ValueError for widths that differ, NaN, infinity, and fewer
    than k references.
    """
    check_sets(queries_ND, references_MD)
    if not 1 <= k <= len(references_MD):
        raise ValueError(f"k={k} nearest of {len(references_MD)} references; k must be between 1 and that number")
    with full_precision(device):
        return _search(queries_ND, references_MD, k, tile, device)


def _search(queries_ND: Tensor, references_MD: Tensor, k: int, tile: int, device: torch.device | str) -> Tensor:
    found_NK = torch.empty(len(queries_ND), k, dtype=torch.float64)
    open_N = torch.arange(len(queries_ND))
    centre_D = centre_of(references_MD)
    for dtype in (torch.float32, torch.float64):
        left_ND = queries_ND if len(open_N) == len(queries_ND) else queries_ND[open_N]
        sure_N = torch.zeros(len(open_N), dtype=torch.bool)
        for query in tiles(left_ND, centre_D, tile, device, dtype):
            count = min(k + SPARE, len(references_MD))
            candidates_AC, bound_A = _candidates(query, references_MD, centre_D, count, tile)
            exact_AK = _exact(left_ND[query.rows], references_MD, candidates_AC, k)
            found_NK[open_N[query.rows]] = exact_AK
            farthest_A = exact_AK[:, -1]
            sure_N[query.rows] = (farthest_A.square() <= bound_A) | (farthest_A == 0)  # nothing is nearer than copies
        open_N = open_N[~sure_N]
    for row in open_N.tolist():
        found_NK[row] = _by_differences(queries_ND[row : row + 1].double(), references_MD, k, tile)
    if not is_finite(found_NK):
        raise ValueError(TOO_LARGE)
    return found_NK


def _candidates(query: Tile, references_MD: Tensor, centre_D: Tensor, count: int, tile: int) -> tuple[Tensor, Tensor]:
    """Of each query the `count` references [A, C] that may be nearest, and the least squared distance [A] of others."""
    queries_AD = query.centred_AD
    slack = rounding(queries_AD.shape[1], queries_AD.dtype)  # so that these are distances that the true ones exceed
    best_AC = queries_AD.new_full((len(queries_AD), count), torch.inf)
    which_AC = torch.zeros_like(best_AC, dtype=torch.int64)
    for part in tiles(references_MD, centre_D, tile, queries_AD.device, queries_AD.dtype):
        lowest_AB = squared_distances(query, part, slack)
        near = lowest_AB.topk(min(count, lowest_AB.shape[1]), largest=False)
        both = torch.cat([best_AC, near.values], 1).topk(count, largest=False)
        which_AC = torch.cat([which_AC, near.indices + part.rows.start], 1).gather(1, both.indices)
        best_AC = both.values
    bound_A = best_AC[:, -1].double()
    bound_A[~bound_A.isfinite()] = -torch.inf  # too large for the dtype: nothing is known
    if count == len(references_MD):
        bound_A.fill_(torch.inf)  # there are no others
    return which_AC.cpu(), bound_A.cpu()


def _exact(queries_AD: Tensor, references_MD: Tensor, candidates_AC: Tensor, k: int) -> Tensor:
    parts = zip(queries_AD.split(ROWS), candidates_AC.split(ROWS), strict=True)
    distances = [(q.double()[:, None] - references_MD[rows].double()).square_().sum(-1).sqrt_() for q, rows in parts]
    return torch.cat(distances).topk(k, largest=False).values


def _by_differences(queries_ND: Tensor, references_MD: Tensor, k: int, tile: int) -> Tensor:
    best_NK = queries_ND.new_full((len(queries_ND), k), torch.inf)
    for tile_BD in references_MD.split(tile):
        found_NB = torch.cdist(queries_ND, tile_BD.double(), compute_mode="donot_use_mm_for_euclid_dist")
        best_NK = torch.cat([best_NK, found_NB], 1).topk(k, largest=False).values
    return best_NK


@dataclass(frozen=True, kw_only=True)
class NearestNeighbourConfig:
    """Median distance to the nearest image of the reference: no options."""


@METRICS.register("nearest_neighbour", NearestNeighbourConfig)
class NearestNeighbour(Metric):
    """`nearest_features` and, where both sides have thumbnails, `nearest_pixels` (0..255 a pixel): medians."""

    better = None  # far: unlike any training image; near: maybe a copy of one

    def __call__(self, samples: FeatureSet, reference: FeatureSet) -> dict[str, float]:
        pairs = {"nearest_features": (samples.finite("features_ND"), reference.finite("features_ND"))}
        if samples.thumbnails_NP is not None and reference.thumbnails_NP is not None:
            pairs["nearest_pixels"] = (samples.thumbnails_NP, reference.thumbnails_NP)
        return {name: nearest_distances(*pair, device=self.device).median().item() for name, pair in pairs.items()}

    def in_feature_space(self, value: str) -> bool:
        return value != "nearest_pixels"
