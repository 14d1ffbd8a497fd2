"""Mean and covariance of features in float64, the same for any batching, any order and any split over processes."""

# N samples, D feature width, C rows of a chunk

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

CHUNK = 4096  # rows that are float64 at a time


def is_finite(values: Tensor) -> bool:
    """Whether none is NaN or infinite. It takes no memory, as `values.isfinite()` would."""
    return not values.numel() or not values.is_floating_point() or all(end.isfinite() for end in values.aminmax())


def check_rows(rows_ND: Tensor, what: str = "features") -> None:
    """ValueError, naming the first such row, if one holds NaN or infinity."""
    if is_finite(rows_ND):
        return
    for first, part_CD in enumerate(rows_ND.split(CHUNK)):
        if not is_finite(part_CD):
            row = first * CHUNK + int((~part_CD.isfinite()).any(1).nonzero()[0])
            found = f"sample {row} has NaN or infinity among its {what}"
            raise ValueError(f"{found}; check the images and the weights of the --extractor")


@dataclass(frozen=True, eq=False)
class FeatureMoments:
    """Mean and covariance of features in float64, of n samples or (None) of a number not known."""

    n: int | None
    mean_D: Tensor
    covariance_DD: Tensor | None  # None: fewer than two samples have none

    @classmethod
    def of(cls, features_ND: Tensor) -> FeatureMoments:
        """Moments of features [N, D], N = 0 included. ValueError for another shape, NaN or infinity."""
        if features_ND.ndim != 2:
            raise ValueError(f"features have shape {tuple(features_ND.shape)}; wanted [N, D]")
        check_rows(features_ND)
        n, mean_D, m2_DD = reduce(_merged, (_sums(part_CD.double()) for part_CD in features_ND.split(CHUNK)))
        return cls(n, mean_D, m2_DD / (n - 1) if n > 1 else None)

    def covariance(self) -> Tensor:
        """Covariance [D, D], of samples with the divisor N − 1. ValueError if N < 2."""
        if self.covariance_DD is None:
            raise ValueError(f"{self.n} samples have no covariance; give at least 2 images")
        return self.covariance_DD


Sums = tuple[int, Tensor, Tensor]  # count, mean, and M2 = Σ (x − mean)(x − mean)ᵀ


def _sums(features_CD: Tensor) -> Sums:
    mean_D = features_CD.sum(0) / max(len(features_CD), 1)
    centred_CD = features_CD - mean_D
    return len(features_CD), mean_D, centred_CD.T @ centred_CD


def _merged(one: Sums, other: Sums) -> Sums:
    """Those of both sets together (Chan, Golub, LeVeque 1979)."""
    (n_1, mean_1_D, m2_1_DD), (n_2, mean_2_D, m2_2_DD) = one, other
    n = n_1 + n_2
    share = n_2 / max(n, 1)
    delta_D = mean_2_D - mean_1_D
    return n, mean_1_D + delta_D * share, m2_1_DD + m2_2_DD + torch.outer(delta_D, delta_D) * (n_1 * share)
