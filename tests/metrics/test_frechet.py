import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from dit_moe.metrics import FeatureMoments, expected_floor, frechet, frechet_distance


def distance(x_ND, y_ND):
    a, b = FeatureMoments.of(x_ND), FeatureMoments.of(y_ND)
    return frechet_distance(a.mean_D, a.covariance(), b.mean_D, b.covariance())


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(dim, seed=0):
    return torch.linalg.qr(normal(dim, dim, seed=seed)).Q


@pytest.mark.parametrize("n", [2, 10, 63, 64, 1000])  # fewer samples than features, as many, more
def test_the_distance_of_a_set_to_itself_is_zero(n):
    x_ND = normal(n, 64) * torch.logspace(-3, 3, 64) + 5
    assert 0 <= distance(x_ND, x_ND) < 1e-9 * FeatureMoments.of(x_ND).covariance().trace()


def test_the_distance_of_features_that_are_all_equal_is_that_of_the_means_and_the_variance_of_the_others():
    equal_ND, other_ND = torch.ones(50, 64), normal(100, 64)
    others = FeatureMoments.of(other_ND)
    expected = (1 - others.mean_D).square().sum() + others.covariance().trace()
    assert distance(equal_ND, other_ND) == distance(other_ND, equal_ND) == pytest.approx(expected.item())


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), dim=st.integers(1, 12))
def test_gaussians_with_common_axes_give_the_closed_form_whatever_the_axes(seed, dim):
    random = np.random.default_rng(seed)
    mean_1, mean_2, std_1, std_2 = map(torch.from_numpy, random.uniform(0.1, 5, (4, dim)))
    expected = ((mean_1 - mean_2) ** 2 + (std_1 - std_2) ** 2).sum().item()
    for axes in (torch.eye(dim, dtype=torch.float64), rotation(dim, seed)):
        covariances = [axes @ torch.diag(std**2) @ axes.T for std in (std_1, std_2)]
        found = frechet_distance(axes @ mean_1, covariances[0], axes @ mean_2, covariances[1])
        assert found == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_it_equals_torch_fidelitys_on_double_features():
    x_ND, y_ND = normal(300, 32, seed=1) @ normal(32, 32, seed=2), normal(200, 32, seed=3) + 0.3
    statistics = map(fid_features_to_statistics, (x_ND, y_ND))
    oracle = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert distance(x_ND, y_ND) == pytest.approx(oracle, rel=1e-9)


def test_with_fewer_samples_than_features_it_equals_the_formula_on_the_samples_themselves():
    # Centred samples are factors of their covariance as they stand, so no eigenvalue near zero is ever rooted.
    x_ND, y_ND = normal(20, 128, seed=1), 2 * normal(30, 128, seed=2) + 0.1
    x, y = ((each - each.mean(0)) / (len(each) - 1) ** 0.5 for each in (x_ND, y_ND))
    cross = torch.linalg.svdvals(x @ y.T).sum()
    mean = (x_ND.mean(0) - y_ND.mean(0)).square().sum()
    expected = (mean + x.square().sum() + y.square().sum() - 2 * cross).item()
    # rooted eigenvalues that should be 0 and are 1e-16; worst of 200 seeds 3.2e-9
    assert distance(x_ND, y_ND) == pytest.approx(expected, rel=3e-8)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_it_is_symmetric_and_does_not_see_shifts_and_rotations_of_the_space(seed):
    x_ND, y_ND = normal(50, 6, seed=seed) + 1, 3 * normal(40, 6, seed=seed + 1)
    turn, expected = rotation(6, seed), distance(x_ND, y_ND)
    assert distance(y_ND, x_ND) == pytest.approx(expected, rel=1e-11)
    assert distance(x_ND @ turn + 7, y_ND @ turn + 7) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("n_1, n_2", [(150, 300), (400, 400)])
def test_the_floor_estimate_is_the_mean_distance_of_two_samples_of_one_gaussian(n_1, n_2):
    std_D = torch.logspace(-1, 1, 16, dtype=torch.float64)
    draws = normal(60, n_1 + n_2, 16, seed=5) * std_D
    mean = np.mean([distance(draw[:n_1], draw[n_1:]) for draw in draws])
    # standard error of 60 repetitions 5 %; of 8 seeds one was 12 % above and the others within 5 %
    assert expected_floor(torch.diag(std_D**2), n_1, n_2) == pytest.approx(mean, rel=0.15)


def test_the_floor_estimate_takes_an_unknown_count_for_a_large_one_and_says_none_where_it_does_not_hold():
    covariance = torch.eye(4)
    assert expected_floor(covariance, 10, None) == pytest.approx(expected_floor(covariance, 10, 10**12))
    assert expected_floor(covariance, 4, 9) == pytest.approx((1 / 4 + 1 / 9) * (1.25 * 4 + 0.5 * 16 / 2))
    for counts in ((3, 100), (100, 3), (3, None), (None, None)):
        assert expected_floor(covariance, *counts) is None
    with pytest.raises(ValueError, match="not positive semi-definite"):
        expected_floor(-covariance, 10, 10)
    with pytest.raises(ValueError, match="too large for float64"):
        expected_floor(covariance.double() * 1e300, 10, 10)


@pytest.mark.parametrize("decades", [6, 11, 14, 17])
def test_choleskys_factors_and_eigenvectors_give_the_same_where_both_do(decades):
    # Variances down to where Cholesky's factors give way to eigenvectors; common axes, so that the answer is known.
    std_1, std_2 = torch.logspace(0, -decades / 2, 24).double(), torch.logspace(-decades / 2, 0, 24).double()
    axes, expected = rotation(24), (std_1 - std_2).square().sum().item()
    cov_1, cov_2 = (axes @ torch.diag(std**2) @ axes.T for std in (std_1, std_2))
    mean = torch.zeros(24)
    # variances of 1e-16, lost in rounding, have roots of 1e-8
    assert frechet_distance(mean, cov_1, mean, cov_2) == pytest.approx(expected, rel=1e-7 if decades > 11 else 1e-10)


@pytest.mark.parametrize("kind", ["constant", "collinear"])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_singular_covariance_on_either_side_gives_the_formula_without_singular_values(kind, swapped, monkeypatch):
    x_ND, y_ND = normal(200, 30, seed=1), 2 * normal(200, 30, seed=2)
    x_ND[:, 7] = x_ND[:, 3] if kind == "collinear" else 0.0
    x, y = (FeatureMoments.of(each).covariance() for each in (x_ND, y_ND))
    lambda_D, vectors_DD = torch.linalg.eigh(y)
    root_DD = vectors_DD * lambda_D.sqrt() @ vectors_DD.T
    # eigenvalues of the product that should be 0 are rounded: their roots are 1e-8 of the others
    cross = torch.linalg.eigvalsh(root_DD @ x @ root_DD).clamp(min=0).sqrt().sum()
    mean = torch.zeros(30)
    monkeypatch.setattr(torch.linalg, "svdvals", lambda *_: pytest.fail("singular values were needed"))
    found = frechet_distance(mean, *((y, mean, x) if swapped else (x, mean, y)))
    assert found == pytest.approx((x.trace() + y.trace() - 2 * cross).item(), rel=1e-7)


@pytest.mark.parametrize("decades, fast", [(0, True), (4, True), (9, False)])
def test_eigenvalues_serve_where_they_are_exact_and_singular_values_elsewhere(decades, fast, monkeypatch):
    std_D = torch.logspace(0, -decades / 2, 24, dtype=torch.float64)
    cov_1, cov_2 = (
        FeatureMoments.of(normal(72, 24, seed=seed) * std_D @ rotation(24, seed)).covariance() for seed in (1, 2)
    )
    mean, svdvals, called = torch.zeros(24), torch.linalg.svdvals, []
    monkeypatch.setattr(torch.linalg, "svdvals", lambda m: called.append(m) or svdvals(m))
    found = frechet_distance(mean, cov_1, mean, cov_2)
    assert bool(called) != fast
    monkeypatch.setattr(frechet, "_sum_of_roots", lambda *args: None)
    assert frechet_distance(mean, cov_1, mean, cov_2) == pytest.approx(found, rel=1e-11)


def test_constant_features_have_a_distance_between_their_means_and_no_floor():
    assert distance(*(torch.full((9, 2), value).double() for value in (1, 3))) == 8
    assert expected_floor(torch.zeros(2, 2), 10, 10) == 0


def broken(*entries):
    matrix = torch.eye(3)
    for i, j, value in entries:
        matrix[i, j] = value
    return matrix


@pytest.mark.parametrize(
    "mean, covariance, message",
    [
        (torch.zeros(3), broken((2, 2, -1e-6)), "not positive semi-definite"),
        (torch.zeros(3), broken((0, 0, 0.0), (0, 1, 0.5), (1, 0, 0.5)), "not positive semi-definite"),
        (torch.zeros(3), broken((1, 1, torch.nan)), "a covariance holds NaN or infinity"),
        (torch.tensor([0, torch.nan, 0]), torch.eye(3), "a mean holds NaN or infinity"),
        (torch.full((3,), 1e200, dtype=torch.float64), torch.eye(3), "too large for float64"),
        (torch.zeros(4), torch.eye(4), r"moments of shape \((3|4),"),
    ],
)
def test_moments_that_are_none_are_refused_on_either_side(mean, covariance, message):
    good = torch.zeros(3), torch.eye(3)
    for pair in (((mean, covariance), good), (good, (mean, covariance))):
        with pytest.raises(ValueError, match=message):
            frechet_distance(*pair[0], *pair[1])
    rounded = frechet_distance(torch.zeros(3), broken((2, 2, -1e-10)), *good)  # an eigenvalue that is taken for 0
    assert rounded == pytest.approx(1)
