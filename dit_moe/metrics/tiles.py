"""Distances between two large sets of features, tile by tile: memory is that of a few tiles, whatever the counts."""

# N rows, M other rows, D feature width, A and B rows of a tile

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dit_moe.metrics.finite import check_rows

TILE = 2048
TOO_LARGE = "features are so large that their squares overflow; check the --extractor"


class Tile(NamedTuple):
    """Some rows of a set, less a centre common to all sets compared, with their squared norms."""

    rows: slice
    centred_AD: Tensor
    squares_A: Tensor


def check_sets(queries_ND: Tensor, references_MD: Tensor) -> None:
    """ValueError unless both are as wide, and finite."""
    if queries_ND.shape[1] != references_MD.shape[1]:
        found = f"queries are {queries_ND.shape[1]} wide and references {references_MD.shape[1]}"
        raise ValueError(f"{found}; take the features of both with one --extractor")
    for rows in (queries_ND, references_MD):
        check_rows(rows)


def centre_of(rows_ND: Tensor, tile: int = TILE) -> Tensor:
    """About the mean row, in float32. Less it, rows have small norms, and so their distances little rounding."""
    total_D = torch.zeros(rows_ND.shape[1], dtype=torch.float64)
    for part_AD in rows_ND.split(tile):  # a sum in another dtype would copy all rows to it
        total_D += part_AD.double().sum(0)
    most = torch.finfo(torch.float32).max
    return (total_D / max(len(rows_ND), 1)).clamp(-most, most).float()


def tiles(
    rows_ND: Tensor, centre_D: Tensor, tile: int, device: torch.device | str, dtype: torch.dtype
) -> Iterator[Tile]:
    """The rows, `tile` at a time, on `device` in `dtype`. ValueError if their squares are too large for float64."""
    exact = torch.promote_types(torch.promote_types(rows_ND.dtype, torch.float32), dtype)  # holds rows as they are
    centre_D = centre_D.to(device, exact)
    for first in range(0, len(rows_ND), tile):
        copy_AD = rows_ND[first : first + tile].to(device, exact, copy=True)
        centred_AD = copy_AD.sub_(centre_D).to(dtype)
        squares_A = torch.linalg.vector_norm(centred_AD, dim=1).square()  # unlike square().sum(), without a copy
        if dtype == torch.float64 and not squares_A.isfinite().all():
            raise ValueError(TOO_LARGE)
        yield Tile(slice(first, first + len(centred_AD)), centred_AD, squares_A)


def squared_distances(a: Tile, b: Tile, slack: float = 0.0) -> Tensor:
    """|a|² + |b|² − 2a·b, [A, B], each less `slack`·(|a|² + |b|²). Rounding may leave it below 0."""
    distances_AB = torch.addmm((1 - slack) * b.squares_A, a.centred_AD, b.centred_AD.T, alpha=-2)
    return distances_AB.add_((1 - slack) * a.squares_A[:, None])


def rounding(dim: int, dtype: torch.dtype) -> float:
    """The share of |a|² + |b|² by which `squared_distances` can be off: that of three sums of `dim` products (Higham
    2002, §3.1), of adding them, of roots and of rounding the rows to `dtype`."""
    return (dim + 8) * torch.finfo(dtype).eps
