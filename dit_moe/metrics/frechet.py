"""Fréchet distance between Gaussians, and what it would read for two samples of one distribution."""

# D feature width, R rank

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_moe.metrics.base import METRICS, FeatureSet, Metric
from dit_moe.metrics.finite import is_finite
from dit_moe.metrics.moments import Moments

CLAMP = 1e-9  # negatives up to this share of the trace are rounding, larger ones a mistake
ENOUGH = 1e-10  # error, as a share of the trace, that eigenvalues may bring instead of singular values; seen: 1e-14
BLOCK = 256


def frechet_distance(mean_1_D: Tensor, covariance_1_DD: Tensor, mean_2_D: Tensor, covariance_2_DD: Tensor) -> float:
    """|μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2·tr (Σ₁Σ₂)^½, in squared feature units (Dowson & Landau 1982).

    With Σ = FFᵀ the last trace is the nuclear norm of F₁ᵀF₂: no matrix square root, and any factors F will do, which
    are Cholesky's, or else eigenvectors where a covariance has not full rank (fewer samples than features). Computed in
    float64, at any scale whose squares it holds. Raises ValueError for shapes that do not fit, for a matrix that is not
    a covariance and for values that are not finite or too large.
    """
    dim = mean_1_D.shape[0]
    for moment, shape in ((mean_2_D, (dim,)), (covariance_1_DD, (dim, dim)), (covariance_2_DD, (dim, dim))):
        if moment.shape != shape:
            raise ValueError(f"moments of shape {tuple(moment.shape)} beside a mean of {dim} features; wanted {shape}")
    for mean_D, covariance_DD in ((mean_1_D, covariance_1_DD), (mean_2_D, covariance_2_DD)):
        _check_finite(mean_D, "mean")
        _check_finite(covariance_DD, "covariance")
    covariances = [covariance_1_DD.double(), covariance_2_DD.double()]
    unit = _power_of_two(max(each.diagonal().abs().max().item() for each in covariances) if dim else 0.0)
    try:
        apart = _between_covariances(*(each / unit for each in covariances)) * unit
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"no eigenvalues of a covariance were found ({error}); check the features") from None
    squared = (mean_1_D.double() - mean_2_D.double()).square().sum().item() + apart
    if not math.isfinite(squared):
        raise ValueError("the distance is too large for float64; check the features the moments were made from")
    return squared


def _between_covariances(covariance_1_DD: Tensor, covariance_2_DD: Tensor) -> float:
    """tr Σ₁ + tr Σ₂ − 2·tr (Σ₁Σ₂)^½ of matrices whose entries are about 1 or less."""
    alive_D = (covariance_1_DD != 0).any(1) | (covariance_2_DD != 0).any(1)
    if not alive_D.all():  # constant features on both sides: they add nothing, but have no Cholesky factor
        covariance_1_DD, covariance_2_DD = (each[alive_D][:, alive_D] for each in (covariance_1_DD, covariance_2_DD))
    if not len(covariance_1_DD):
        return 0.0
    # The fast way needs one factor only. The other is for the check, which its trace would not be, that both matrices
    # are covariances, and for the choice of the narrower one: it leaves the product no eigenvalues that should be 0.
    (factor_1_DR, triangular), (factor_2_DR, other_triangular) = _factor(covariance_1_DD), _factor(covariance_2_DD)
    ranks = factor_1_DR.shape[1], factor_2_DR.shape[1]
    if ranks[1] < ranks[0] or (ranks[1] == ranks[0] and other_triangular):
        factor_1_DR, factor_2_DR, triangular = factor_2_DR, factor_1_DR, other_triangular
        covariance_1_DD, covariance_2_DD = covariance_2_DD, covariance_1_DD
    traces = covariance_1_DD.trace() + covariance_2_DD.trace()
    product_RR = (
        _congruent(factor_1_DR, covariance_2_DD) if triangular else factor_1_DR.T @ covariance_2_DD @ factor_1_DR
    )
    cross = _fast_nuclear_norm(product_RR, ENOUGH * traces)
    if cross is None:
        cross = torch.linalg.svdvals(factor_1_DR.T @ factor_2_DR).sum()
    return _clamp(traces - 2 * cross, traces).item()


def expected_floor(covariance_DD: Tensor, n_1: int | None, n_2: int | None) -> float | None:
    """Expected Fréchet distance of two samples of n₁ and n₂ from one Gaussian with this covariance.

    (1/n₁ + 1/n₂)·(1.25·tr Σ + ½·Σᵢⱼ λᵢλⱼ/(λᵢ + λⱼ)), to second order: tr Σ from the means, the rest from the
    covariances, whose sampling error has E δᵢⱼ² = (1/n₁ + 1/n₂)(λᵢλⱼ + [i=j]·λᵢ²) in the eigenbasis.

    Near n = D the next orders show: with 64 equal variances and the other side exact it is 18 % low at n = D (17.2
    against 21.0 simulated), 7 % at 2·D and 3 % at 4·D; between two samples of n = D it is 1 % low.

    An n of None is a number not known and taken to be so large that its share is 0, so that the floor comes out too
    low if anything. Returns None where the formula does not hold: an n below D, or neither known. Raises ValueError for
    a matrix that is not a covariance.
    """
    known = [n for n in (n_1, n_2) if n is not None]
    if not known or min(known) < len(covariance_DD):
        return None
    covariance_DD = covariance_DD.double()
    _check_finite(covariance_DD, "covariance")
    unit = _power_of_two(covariance_DD.diagonal().abs().max().item())
    covariance_DD = covariance_DD / unit
    lambda_D = _clamp(torch.linalg.eigvalsh(covariance_DD), covariance_DD.trace())
    products_DD, sums_DD = torch.outer(lambda_D, lambda_D), lambda_D[:, None] + lambda_D
    harmonic = (products_DD / sums_DD.where(sums_DD > 0, 1.0)).sum()
    return sum(1 / n for n in known) * (1.25 * lambda_D.sum() + 0.5 * harmonic).item() * unit


def _power_of_two(size: float) -> float:
    """Near `size`, so that divisions by it round nothing; 1 for 0."""
    return 2.0 ** (math.frexp(size)[1] - 1) if size else 1.0


def _fast_nuclear_norm(product_RR: Tensor, enough: Tensor) -> Tensor | None:
    """Σ√λ of FᵀΣF; None unless the error, if each λ is off by about a rounding of the largest, is below `enough`.

    A quarter of the time of singular values, but roots of small λ have few digits.
    """
    try:
        lambda_D = torch.linalg.eigvalsh(product_RR).clamp(min=0)
    except torch.linalg.LinAlgError:
        return None
    root_D, rounding = lambda_D.sqrt(), torch.finfo(torch.float64).eps * lambda_D.max()
    error = ((lambda_D + rounding).sqrt() - root_D).sum()
    return root_D.sum() if error < enough else None


def _congruent(lower_DD: Tensor, covariance_DD: Tensor) -> Tensor:
    """The lower triangle of LᵀΣL, by blocks, so that half of the products with zeros and of the upper one are saved."""
    half_DD, product_DD = torch.empty_like(covariance_DD), torch.zeros_like(covariance_DD)
    blocks = [slice(i, i + BLOCK) for i in range(0, len(lower_DD), BLOCK)]
    for block in blocks:
        half_DD[block] = lower_DD[block.start :, block].T @ covariance_DD[block.start :]
    for block in blocks:
        product_DD[block.start :, block] = half_DD[block.start :, block.start :] @ lower_DD[block.start :, block]
    return product_DD


def _factor(covariance_DD: Tensor) -> tuple[Tensor, bool]:
    """F [D, R] with FFᵀ = Σ, and whether it is Cholesky's, a lower triangle; if not, R is the rank."""
    lower_DD = _cholesky(covariance_DD)
    if lower_DD is not None:  # then LLᵀ is Σ but for rounding, however near to singular it is (Higham 2002, §10.1)
        return lower_DD, True
    lambda_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    lambda_D = _clamp(lambda_D, covariance_DD.trace())
    known_D = lambda_D > len(lambda_D) * torch.finfo(torch.float64).eps * lambda_D.max()  # others are rounding
    return vectors_DD[:, known_D] * lambda_D[known_D].sqrt(), False


def _cholesky(covariance_DD: Tensor) -> Tensor | None:
    """L with LLᵀ = Σ, None if Σ is not positive definite. By blocks: half of the time of one call of the library's."""
    lower_DD = torch.zeros_like(covariance_DD)
    for i in range(0, len(lower_DD), BLOCK):
        block, below = slice(i, i + BLOCK), slice(i + BLOCK, None)
        rest_AB = covariance_DD[i:, block] - lower_DD[i:, :i] @ lower_DD[block, :i].T
        corner_BB, failed = torch.linalg.cholesky_ex(rest_AB[:BLOCK])
        if failed:
            return None
        lower_DD[block, block] = corner_BB
        lower_DD[below, block] = torch.linalg.solve_triangular(corner_BB, rest_AB[BLOCK:].T, upper=False).T
    return lower_DD


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

    def __call__(self, samples: FeatureSet, reference: FeatureSet) -> dict[str, float]:
        assert samples.moments is not None and reference.moments is not None
        return {"fd": _between(samples, samples.moments, reference, reference.moments)}


@dataclass(frozen=True, kw_only=True)
class SpatialFrechetDistanceConfig:
    """Fréchet distance of the spatial features: no options."""


@METRICS.register("sfd", SpatialFrechetDistanceConfig)
class SpatialFrechetDistance(Metric):
    """`sfd`. sFID where the features are Inception's."""

    needs: ClassVar[frozenset[str]] = frozenset({"spatial_moments"})

    def __call__(self, samples: FeatureSet, reference: FeatureSet) -> dict[str, float]:
        assert samples.spatial_moments is not None and reference.spatial_moments is not None
        return {"sfd": _between(samples, samples.spatial_moments, reference, reference.spatial_moments)}


def _between(samples: FeatureSet, ours: Moments, reference: FeatureSet, theirs: Moments) -> float:
    try:
        return frechet_distance(ours.mean_D, ours.covariance(), theirs.mean_D, theirs.covariance())
    except ValueError as error:
        raise ValueError(f"{samples.source} against {reference.source}: {error}") from None
