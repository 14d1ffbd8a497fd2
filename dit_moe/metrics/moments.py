"""Mean and covariance of features in float64, the same for any batching, any order and any split over processes."""

# N samples, D feature width

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Protocol

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


class Moments(Protocol):
    """A mean and a covariance, of n samples or (None) of a number not known."""

    @property
    def n(self) -> int | None: ...

    @property
    def mean_D(self) -> Tensor: ...

    def covariance(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class GivenMoments:
    """Moments as a file states them, in float64."""

    n: int | None
    mean_D: Tensor
    covariance_DD: Tensor

    def covariance(self) -> Tensor:
        """As given."""
        return self.covariance_DD


@dataclass(frozen=True, eq=False)
class FeatureMoments:
    """Count, mean and M2 = Σ (x − mean)(x − mean)ᵀ of a set of features."""

    n: int
    mean_D: Tensor
    m2_DD: Tensor

    @classmethod
    def of(cls, features_ND: Tensor) -> FeatureMoments:
        """Moments of features [N, D], N = 0 included. ValueError for another shape, NaN or infinity."""
        if features_ND.ndim != 2:
            raise ValueError(f"features have shape {tuple(features_ND.shape)}; wanted [N, D]")
        check_rows(features_ND)
        first, *rest = (cls._of(part_ND.double()) for part_ND in features_ND.split(CHUNK))
        return reduce(FeatureMoments.merge, rest, first)

    @classmethod
    def _of(cls, features_ND: Tensor) -> FeatureMoments:
        mean_D = features_ND.sum(0) / max(len(features_ND), 1)
        centred_ND = features_ND - mean_D
        return cls(len(features_ND), mean_D, centred_ND.T @ centred_ND)

    def merge(self, other: FeatureMoments) -> FeatureMoments:
        """Moments of both sets together (Chan, Golub, LeVeque 1979)."""
        n = self.n + other.n
        share = other.n / max(n, 1)
        delta_D = other.mean_D - self.mean_D
        m2_DD = self.m2_DD + other.m2_DD + torch.outer(delta_D, delta_D) * (self.n * share)
        return FeatureMoments(n, self.mean_D + delta_D * share, m2_DD)

    def covariance(self) -> Tensor:
        """Covariance [D, D] with the divisor N − 1. ValueError if N < 2."""
        if self.n < 2:
            raise ValueError(f"{self.n} samples have no covariance; give at least 2 images")
        return self.m2_DD / (self.n - 1)
