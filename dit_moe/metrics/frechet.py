"""Fréchet distance between Gaussians, and what it would read for two samples of one distribution."""

# D feature width, R rank

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_moe.metrics.base import METRICS, FeatureSet, Metric
from dit_moe.metrics.moments import is_finite

CLAMP = 1e-9  # negative eigenvalues up to this share of the trace are rounding, larger ones a mistake
ACCURATE = 1e-10  # error, as a share of the traces, up to which eigenvalues stand in for singular values; seen: 1e-14


def frechet_distance(mean_1_D: Tensor, covariance_1_DD: Tensor, mean_2_D: Tensor, covariance_2_DD: Tensor) -> float:
    """|μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2·tr (Σ₁Σ₂)^½, in squared feature units (Dowson & Landau 1982).

    With Σ = FFᵀ the last trace is the nuclear norm of F₁ᵀF₂, so that no matrix square root is needed. Computed in
    float64. Raises ValueError for shapes that do not fit, for a matrix that is not a covariance and for values that are
    not finite or too large.
    """
    dim = mean_1_D.shape[0]
    for moment, shape in ((mean_2_D, (dim,)), (covariance_1_DD, (dim, dim)), (covariance_2_DD, (dim, dim))):
        if moment.shape != shape:
            raise ValueError(f"moments of shape {tuple(moment.shape)} beside a mean of {dim} features; wanted {shape}")
    for mean_D, covariance_DD in ((mean_1_D, covariance_1_DD), (mean_2_D, covariance_2_DD)):
        _check_finite(mean_D, "mean")
        _check_finite(covariance_DD, "covariance")
    covariances = [covariance_1_DD.double(), covariance_2_DD.double()]
    # LAPACK's eigenvalues depend a little on the scale: a power of 2 near the largest variance, which rounds nothing.
    largest = max(each.diagonal().abs().max().item() for each in covariances) if dim else 0.0
    unit = 2.0 ** (math.frexp(largest)[1] - 1) if largest else 1.0
    try:
        between_covariances = _between_covariances(*(each / unit for each in covariances)) * unit
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"no eigenvalues of a covariance were found ({error}); check the features") from None
    distance = (mean_1_D.double() - mean_2_D.double()).square().sum().item() + between_covariances
    if not math.isfinite(distance):
        raise ValueError("the distance is too large for float64; check the features the moments were made from")
    return distance


def _between_covariances(covariance_1_DD: Tensor, covariance_2_DD: Tensor) -> float:
    """tr Σ₁ + tr Σ₂ − 2·tr (Σ₁Σ₂)^½."""
    varies_D = (covariance_1_DD != 0).any(1) | (covariance_2_DD != 0).any(1)
    if not varies_D.all():  # features that are constant on both sides add nothing, but have no Cholesky factor
        covariance_1_DD, covariance_2_DD = (each[varies_D][:, varies_D] for each in (covariance_1_DD, covariance_2_DD))
    if not varies_D.any():
        return 0.0
    factor_1_DR, factor_2_DR = _factor(covariance_1_DD), _factor(covariance_2_DD)
    traces = covariance_1_DD.trace() + covariance_2_DD.trace()
    # The factor of lower rank leaves the product no eigenvalues that should be 0.
    ranks = factor_1_DR.shape[1], factor_2_DR.shape[1]
    if not min(ranks):  # features of one side that are all equal
        return traces.item()
    if ranks[1] < ranks[0] or min(ranks) == len(covariance_2_DD):
        factor_1_DR, factor_2_DR, covariance_2_DD = factor_2_DR, factor_1_DR, covariance_1_DD
    cross = _sum_of_roots(factor_1_DR.T @ covariance_2_DD @ factor_1_DR, ACCURATE * traces)
    if cross is None:
        cross = torch.linalg.svdvals(factor_1_DR.T @ factor_2_DR).sum()
    return _clamp(traces - 2 * cross, traces).item()


def _sum_of_roots(product_RR: Tensor, allowed: Tensor) -> Tensor | None:
    """Σ√λ of FᵀΣF in a quarter of the time of singular values; None if small λ, whose roots have few digits, could
    bring an error above `allowed`, or where they do not converge."""
    try:
        lambda_R = torch.linalg.eigvalsh(product_RR).clamp(min=0)
    except torch.linalg.LinAlgError:  # singular values converge where these do not
        return None
    rounding = torch.finfo(torch.float64).eps * lambda_R.max()
    error = ((lambda_R + rounding).sqrt() - lambda_R.sqrt()).sum()
    return lambda_R.sqrt().sum() if error < allowed else None


def _factor(covariance_DD: Tensor) -> Tensor:
    """F [D, R] with FFᵀ = Σ: Cholesky's, or of a singular Σ its R eigenvectors of eigenvalues above 0."""
    lower_DD, failed = torch.linalg.cholesky_ex(covariance_DD)
    if not failed:
        return lower_DD.contiguous()
    lambda_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    lambda_D = _clamp(lambda_D, covariance_DD.trace())
    kept_D = lambda_D > len(lambda_D) * torch.finfo(torch.float64).eps * lambda_D.max()  # the others are rounding
    return vectors_DD[:, kept_D] * lambda_D[kept_D].sqrt()


def expected_floor(covariance_DD: Tensor, n_1: int | None, n_2: int | None) -> float | None:
    """Expected Fréchet distance of two samples of n₁ and n₂ from one Gaussian with this covariance.

    (1/n₁ + 1/n₂)·(1.25·tr Σ + ½·Σᵢⱼ λᵢλⱼ/(λᵢ + λⱼ)), to second order: tr Σ from the means, the rest from the
    covariances, whose sampling error has E δᵢⱼ² = (1/n₁ + 1/n₂)(λᵢλⱼ + [i=j]·λᵢ²) in the eigenbasis.

    Near n = D the next orders show: with 64 equal variances and the other side exact it is 18 % low at n = D (17.2
    against 21.0 simulated), 7 % at 2·D and 3 % at 4·D; between two samples of n = D it is 1 % low.

    A count of None is unknown and taken as very large, so that the floor comes out too low if anything. Returns None
    where the formula does not hold: a count below D, or both unknown. Raises ValueError for a matrix that is not a
    covariance, or of which values are too large.
    """
    known = [n for n in (n_1, n_2) if n is not None]
    if not known or min(known) < len(covariance_DD):
        return None
    covariance_DD = covariance_DD.double()
    _check_finite(covariance_DD, "covariance")
    lambda_D = _clamp(torch.linalg.eigvalsh(covariance_DD), covariance_DD.trace())
    products_DD, sums_DD = torch.outer(lambda_D, lambda_D), lambda_D[:, None] + lambda_D
    harmonic = (products_DD / sums_DD.where(sums_DD > 0, 1.0)).sum()
    floor = sum(1 / n for n in known) * (1.25 * lambda_D.sum() + 0.5 * harmonic).item()
    if not math.isfinite(floor):
        raise ValueError("a covariance is too large for float64; check the features it was made from")
    return floor


def _check_finite(moment: Tensor, what: str) -> None:
    if not is_finite(moment):
        raise ValueError(f"a {what} holds NaN or infinity; check the features it was made from")


def _clamp(values: Tensor, trace: Tensor) -> Tensor:
    lowest = values.min()
    if lowest < -CLAMP * trace.clamp(min=0):
        raise ValueError(
            f"{lowest:.3g} where nothing negative can be (trace {trace:.3g}): a covariance is not positive "
            "semi-definite; make the statistics again in float64"
        )
    return values.clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class FrechetDistanceConfig:
    """Fréchet distance of the features: no options."""


@METRICS.register("fd", FrechetDistanceConfig)
class FrechetDistance(Metric):
    """`fd`. FID where the features are Inception's."""

    needs: ClassVar[frozenset[str]] = frozenset({"moments"})
    values: ClassVar[tuple[str, ...]] = ("fd",)

    def __call__(self, samples: FeatureSet, reference: FeatureSet) -> dict[str, float]:
        (moments,), (value,) = self.needs, self.values
        ours, theirs = getattr(samples, moments), getattr(reference, moments)
        try:
            distance = frechet_distance(ours.mean_D, ours.covariance(), theirs.mean_D, theirs.covariance())
        except ValueError as error:
            raise ValueError(f"{samples.source} against {reference.source}: {error}") from None
        return {value: distance}


@dataclass(frozen=True, kw_only=True)
class SpatialFrechetDistanceConfig:
    """Fréchet distance of the spatial features: no options."""


@METRICS.register("sfd", SpatialFrechetDistanceConfig)
class SpatialFrechetDistance(FrechetDistance):
    """`sfd`. sFID where the features are Inception's."""

    needs: ClassVar[frozenset[str]] = frozenset({"spatial_moments"})
    values = ("sfd",)
