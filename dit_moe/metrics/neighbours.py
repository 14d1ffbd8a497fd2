"""Distances to nearest neighbours: samples much nearer to the training images than held-out ones are were memorised.

Everything is computed in float64, tile by tile: memory is that of a few tiles, whatever the counts.
"""

# N queries, M references, D feature width, K neighbours, C candidates, A queries of a tile, B references of a tile

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_moe.metrics.base import METRICS, FeatureSet, Metric
from dit_moe.metrics.moments import check_rows

TILE = 2048  # rows
SPARE = 7  # candidates beyond k: rounding may leave open which of them are the nearest
ROWS = 64  # queries whose candidates are compared at a time


def nearest_distances(
    queries_ND: Tensor, references_MD: Tensor, k: int = 1, tile: int = TILE, device: torch.device | str = "cpu"
) -> Tensor:
    """Euclidean distances of each query to its k nearest references, [N, K] in float64, ascending.

    Candidates are found by products of matrices; the distances to them are then taken by differences, so that a copy
    is at distance 0 exactly. Raises ValueError for widths that differ, NaN, infinity, and fewer than k references.
    """
    check_sets(queries_ND, references_MD)
    if not 1 <= k <= len(references_MD):
        raise ValueError(f"k={k} nearest of {len(references_MD)} references; k must be between 1 and that number")
    found_NK = torch.empty(len(queries_ND), k, dtype=torch.float64)
    for queries, nearest_AC in _candidates(queries_ND, references_MD, min(k + SPARE, len(references_MD)), tile, device):
        pairs = zip(queries_ND[queries].split(ROWS), nearest_AC.split(ROWS), strict=True)
        exact = [(q.double()[:, None] - references_MD[rows].double()).square_().sum(-1).sqrt_() for q, rows in pairs]
        found_NK[queries] = torch.cat(exact).topk(k, largest=False).values.sort(1).values
    return found_NK


def _candidates(
    queries_ND: Tensor, references_MD: Tensor, count: int, tile: int, device: torch.device | str
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of queries, a tile at a time, and the `count` references [A, C] nearest to each."""
    best_AC, which_AC = torch.empty(0), torch.empty(0)
    for queries, references, squared_AB, _ in squared_distances(queries_ND, references_MD, tile, device):
        if references.start == 0:
            best_AC = squared_AB.new_full((len(squared_AB), count), torch.inf)
            which_AC = torch.zeros_like(best_AC, dtype=torch.int64)
        near = squared_AB.topk(min(count, squared_AB.shape[1]), largest=False)
        both = torch.cat([best_AC, near.values], 1).topk(count, largest=False)
        which_AC = torch.cat([which_AC, near.indices + references.start], 1).gather(1, both.indices)
        best_AC = both.values
        if references.stop == len(references_MD):
            yield queries, which_AC.cpu()


def squared_distances(
    queries_ND: Tensor, references_MD: Tensor, tile: int = TILE, device: torch.device | str = "cpu"
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """All pairs of tiles, those of one tile of queries together: their rows, squared distances [A, B], and how far
    rounding may put these off, [A, B].

    ValueError for features whose squares are too large for float64.
    """
    # |a|² + |b|² − 2a·b has an error that grows with the norms: less their mean, rows have small ones.
    total_D = sum(part_BD.sum(0, dtype=torch.float64) for part_BD in references_MD.split(tile))
    centre_D = (total_D / len(references_MD)).to(device)
    error = (queries_ND.shape[1] + 8) * torch.finfo(torch.float64).eps  # share of |a|² + |b|² (Higham 2002, §3.1)

    def tiles(rows_ND: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for first in range(0, len(rows_ND), tile):
            centred_AD = rows_ND[first : first + tile].to(device, torch.float64) - centre_D
            squares_A = centred_AD.square().sum(1)
            if not squares_A.isfinite().all():
                raise ValueError("features are so large that their squares overflow; check the --extractor")
            yield slice(first, first + len(centred_AD)), centred_AD, squares_A

    for queries, a_AD, squares_A in tiles(queries_ND):
        for references, b_BD, squares_B in tiles(references_MD):
            norms_AB = squares_A[:, None] + squares_B
            yield queries, references, torch.addmm(norms_AB, a_AD, b_BD.T, alpha=-2), error * norms_AB


def check_sets(queries_ND: Tensor, references_MD: Tensor) -> None:
    """ValueError unless both are as wide, and finite."""
    if queries_ND.shape[1] != references_MD.shape[1]:
        found = f"queries are {queries_ND.shape[1]} wide and references {references_MD.shape[1]}"
        raise ValueError(f"{found}; take the features of both with one --extractor")
    for rows in (queries_ND, references_MD):
        check_rows(rows)


@dataclass(frozen=True, kw_only=True)
class NearestNeighbourConfig:
    """Median distance to the nearest image of the reference: no options."""


@METRICS.register("nearest_neighbour", NearestNeighbourConfig)
class NearestNeighbour(Metric):
    """`nearest_features` and, where both sides have thumbnails, `nearest_pixels` (0..255 a pixel): medians."""

    values = ("nearest_features", "nearest_pixels")
    better = None  # far: unlike any training image; near: maybe a copy of one

    def __call__(self, samples: FeatureSet, reference: FeatureSet) -> dict[str, float]:
        pairs = {"nearest_features": (samples.finite("features_ND"), reference.finite("features_ND"))}
        if samples.thumbnails_NP is not None and reference.thumbnails_NP is not None:
            pairs["nearest_pixels"] = (samples.thumbnails_NP, reference.thumbnails_NP)
        return {name: nearest_distances(*pair, device=self.device).median().item() for name, pair in pairs.items()}

    def in_feature_space(self, value: str) -> bool:
        return value != "nearest_pixels"
