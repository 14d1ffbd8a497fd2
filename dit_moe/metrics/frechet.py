"""Fréchet distance between Gaussians, and what it would read for two samples of one distribution."""

# D feature width

from __future__ import annotations

import torch
from torch import Tensor

CLAMP = 1e-9  # negatives up to this share of the trace are rounding, larger ones a mistake


def frechet_distance(mean_1_D: Tensor, covariance_1_DD: Tensor, mean_2_D: Tensor, covariance_2_DD: Tensor) -> float:
    """|μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2·tr (Σ₁Σ₂)^½, in squared feature units (Dowson & Landau 1982).

    With Σ = FFᵀ the last trace is the nuclear norm of F₁ᵀF₂: no matrix square root, and rank-deficient covariances
    (fewer samples than features) need no special care. Computed in float64. Raises ValueError for shapes that do not
    fit and for a matrix that is not a covariance.
    """
    dim = mean_1_D.shape[0]
    for moment, shape in ((mean_2_D, (dim,)), (covariance_1_DD, (dim, dim)), (covariance_2_DD, (dim, dim))):
        if moment.shape != shape:
            raise ValueError(f"moments of shape {tuple(moment.shape)} beside a mean of {dim} features; wanted {shape}")
    cross = torch.linalg.svdvals(_factor(covariance_1_DD).T @ _factor(covariance_2_DD)).sum()
    traces = covariance_1_DD.double().trace() + covariance_2_DD.double().trace()
    squared = (mean_1_D.double() - mean_2_D.double()).square().sum() + traces - 2 * cross
    return _clamp(squared, traces).item()


def expected_floor(covariance_DD: Tensor, n_1: int, n_2: int) -> float:
    """Expected Fréchet distance of two samples of n₁ and n₂ from one Gaussian with this covariance; both n ≥ D.

    (1/n₁ + 1/n₂)·(1.25·tr Σ + ½·Σᵢⱼ λᵢλⱼ/(λᵢ + λⱼ)), to second order: tr Σ from the means, the rest from the
    covariances, whose sampling error has E δᵢⱼ² = (1/n₁ + 1/n₂)(λᵢλⱼ + [i=j]·λᵢ²) in the eigenbasis.
    """
    lambda_D, _ = _eigh(covariance_DD)
    products_DD, sums_DD = torch.outer(lambda_D, lambda_D), lambda_D[:, None] + lambda_D
    harmonic = (products_DD / sums_DD.where(sums_DD > 0, 1.0)).sum()
    return (1 / n_1 + 1 / n_2) * (1.25 * lambda_D.sum() + 0.5 * harmonic).item()


def _factor(covariance_DD: Tensor) -> Tensor:
    """F with FFᵀ = Σ."""
    lambda_D, vectors_DD = _eigh(covariance_DD)
    return vectors_DD * lambda_D.sqrt()


def _eigh(covariance_DD: Tensor) -> tuple[Tensor, Tensor]:
    covariance_DD = covariance_DD.double()
    if not covariance_DD.isfinite().all():
        raise ValueError("a covariance holds NaN or infinity; check the features it was made from")
    lambda_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    return _clamp(lambda_D, covariance_DD.trace()), vectors_DD


def _clamp(values: Tensor, trace: Tensor) -> Tensor:
    lowest = values.min()
    if lowest < -CLAMP * trace.clamp(min=0):
        raise ValueError(
            f"{lowest:.3g} where nothing negative can be (trace {trace:.3g}): a covariance is not positive "
            "semi-definite; make the statistics again in float64"
        )
    return values.clamp(min=0)
