"""Distances to nearest neighbours: samples much nearer to the training images than held-out ones are were memorised."""

# N queries, M references, D feature width, K neighbours

from __future__ import annotations

import torch
from torch import Tensor


def nearest_distances(queries_ND: Tensor, references_MD: Tensor, k: int = 1, tile: int = 1024) -> Tensor:
    """Euclidean distances of each query to its k nearest references, [N, K] in float64, ascending.

    Memory is O(tile²) whatever N and M are. Differences are taken before squaring, so a copy is at distance 0 exactly.
    Raises ValueError for widths that differ or fewer than k references.
    """
    if queries_ND.shape[1] != references_MD.shape[1]:
        raise ValueError(f"queries are {queries_ND.shape[1]} wide and references {references_MD.shape[1]}")
    if not 1 <= k <= len(references_MD):
        raise ValueError(f"k={k} nearest of {len(references_MD)} references; k must be between 1 and that number")
    return torch.cat([_nearest(q.double(), references_MD, k, tile) for q in queries_ND.split(tile)])


def _nearest(queries_ND: Tensor, references_MD: Tensor, k: int, tile: int) -> Tensor:
    best_NK = queries_ND.new_full((len(queries_ND), k), torch.inf)
    for tile_MD in references_MD.split(tile):
        found_NM = torch.cdist(queries_ND, tile_MD.double(), compute_mode="donot_use_mm_for_euclid_dist")
        best_NK = torch.cat([best_NK, found_NM], 1).topk(k, largest=False).values
    return best_NK
