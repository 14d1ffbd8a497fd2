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


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), dim=st.integers(1, 12))
def test_gaussians_with_common_axes_give_the_closed_form_whatever_the_axes(seed, dim):
    random = np.random.default_rng(seed)
    mean_1, mean_2, std_1, std_2 = map(torch.from_numpy, random.uniform(0.1, 5, (4, dim)))
    expected = ((mean_1 - mean_2) ** 2 + (std_1 - std_2) ** 2).sum().item()
    for axes in (torch.eye(dim, dtype=torch.float64), rotation(dim, seed)):
        covariances = [axes @ torch.diag(std**2) @ axes.T for std in (std_1, std_2)]
        found = frechet_distance(axes @ mean_1, covariances[0], axes @ mean_2, covariances[1])
        assert found == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_plane_gaussians_with_different_axes_give_the_closed_form():
    # For 2×2 matrices tr M^½ = √(tr M + 2 √det M), and tr (Σ₁Σ₂)^½ depends on tr Σ₁Σ₂ and det Σ₁Σ₂ alone.
    turn = rotation(2, seed=3)
    cov_1, cov_2 = (torch.diag(torch.tensor(variances).double()) for variances in ([4.0, 0.5], [3.0, 1.0]))
    cov_2 = turn @ cov_2 @ turn.T
    cross = (torch.trace(cov_1 @ cov_2) + 2 * (cov_1.det() * cov_2.det()).sqrt()).sqrt()
    expected = (1 + cov_1.trace() + cov_2.trace() - 2 * cross).item()
    mean_1, mean_2 = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])
    assert frechet_distance(mean_1, cov_1, mean_2, cov_2) == pytest.approx(expected, rel=1e-10)


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


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_it_is_symmetric_and_does_not_see_shifts_and_rotations_of_the_space(seed):
    x_ND, y_ND = normal(50, 6, seed=seed) + 1, 3 * normal(40, 6, seed=seed + 1)
    turn, expected = rotation(6, seed), distance(x_ND, y_ND)
    assert distance(y_ND, x_ND) == pytest.approx(expected, rel=1e-11)
    assert distance(x_ND @ turn + 7, y_ND @ turn + 7) == pytest.approx(expected, rel=1e-11)


def test_a_matrix_that_is_no_covariance_is_refused_and_rounding_is_not():
    good, mean = torch.eye(3), torch.zeros(3)
    assert frechet_distance(mean, torch.diag(torch.tensor([1.0, 1.0, -1e-10])), mean, good) == pytest.approx(1)
    with pytest.raises(ValueError, match="not positive semi-definite"):
        frechet_distance(mean, torch.diag(torch.tensor([1.0, 1.0, -1e-6])), mean, good)
    with pytest.raises(ValueError, match="NaN or infinity"):
        frechet_distance(mean, torch.diag(torch.tensor([1.0, torch.nan, 1.0])), mean, good)


def test_moments_of_different_widths_are_refused():
    with pytest.raises(ValueError, match=r"shape \(4,\) beside a mean of 3 features"):
        frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4))


@pytest.mark.parametrize("n_1, n_2", [(150, 300), (400, 400)])
def test_the_floor_estimate_is_the_mean_distance_of_two_samples_of_one_gaussian(n_1, n_2):
    std_D = torch.logspace(-1, 1, 16, dtype=torch.float64)
    draws = normal(60, n_1 + n_2, 16, seed=5) * std_D
    mean = np.mean([distance(draw[:n_1], draw[n_1:]) for draw in draws])
    # standard error of 60 repetitions 5 %; of 8 seeds one was 12 % above and the others within 5 %
    assert expected_floor(torch.diag(std_D**2), n_1, n_2) == pytest.approx(mean, rel=0.15)


@pytest.mark.parametrize("n_1, n_2", [(50, 50), (80, None)])
def test_of_one_feature_the_floor_is_mostly_of_the_mean(n_1, n_2):
    # Of one Gaussian the distance is (m₁ − m₂)² + (s₁ − s₂)²; five in six parts are the mean's.
    draws, expected = 3 * normal(40_000, 2, 80, seed=1), expected_floor(torch.tensor([[9.0]]), n_1, n_2)
    one, two = draws[:, 0, :n_1], draws[:, 1, : n_2 or 1]
    mean_2, std_2 = (two.mean(1), two.std(1)) if n_2 else (torch.tensor(0.0), torch.tensor(3.0))
    simulated = ((one.mean(1) - mean_2) ** 2 + (one.std(1) - std_2) ** 2).mean().item()
    # standard error 0.7 %; without the quarter beyond the means' trace it would be 17 % off
    assert expected == pytest.approx(simulated, rel=0.03)


def test_near_as_many_samples_as_features_the_floor_is_as_low_as_documented():
    pairs = []
    for seed in range(6):
        moments = FeatureMoments.of(normal(64, 64, seed=seed))
        eye = torch.eye(64)
        pairs.append(frechet_distance(moments.mean_D, moments.covariance(), torch.zeros(64), eye))
    assert expected_floor(eye, 64, None) == pytest.approx(17.25)
    assert np.mean(pairs) == pytest.approx(21.0, rel=0.05)  # one draw has a spread of 5 %


def test_the_floor_estimate_of_a_constant_feature_is_zero():
    assert expected_floor(torch.zeros(2, 2), 10, 10) == 0


def test_the_floor_estimate_takes_an_unknown_count_for_a_large_one_and_says_none_where_it_does_not_hold():
    covariance = torch.eye(4)
    assert expected_floor(covariance, 10, None) == pytest.approx(expected_floor(covariance, 10, 10**12))
    assert expected_floor(covariance, 4, 9) == pytest.approx((1 / 4 + 1 / 9) * (1.25 * 4 + 0.5 * 16 / 2))
    for counts in ((3, 100), (100, 3), (3, None), (None, None)):
        assert expected_floor(covariance, *counts) is None
    with pytest.raises(ValueError, match="not positive semi-definite"):
        expected_floor(-covariance, 10, 10)


@pytest.mark.parametrize("decades", [6, 11, 14, 17])
def test_choleskys_factors_and_eigenvectors_give_the_same_where_both_do(decades):
    # Variances down to where Cholesky's factors give way to eigenvectors; common axes, so that the answer is known.
    std_1, std_2 = torch.logspace(0, -decades / 2, 24).double(), torch.logspace(-decades / 2, 0, 24).double()
    axes, expected = rotation(24), (std_1 - std_2).square().sum().item()
    cov_1, cov_2 = (axes @ torch.diag(std**2) @ axes.T for std in (std_1, std_2))
    mean = torch.zeros(24)
    # variances of 1e-16, lost in rounding, have roots of 1e-8
    assert frechet_distance(mean, cov_1, mean, cov_2) == pytest.approx(expected, rel=1e-7 if decades > 11 else 1e-10)


def test_a_mean_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="a mean holds NaN or infinity"):
        frechet_distance(torch.tensor([torch.nan]), torch.eye(1), torch.zeros(1), torch.eye(1))


@pytest.mark.parametrize("decades, fast", [(0, True), (4, True), (9, False)])
@pytest.mark.parametrize("dim", [24, 70])  # one block, and blocks of which the last one is smaller
def test_the_fast_way_is_taken_where_it_is_exact_and_equals_singular_values_there(dim, decades, fast, monkeypatch):
    std_D = torch.logspace(0, -decades / 2, dim, dtype=torch.float64)
    cov_1, cov_2 = (
        FeatureMoments.of(normal(3 * dim, dim, seed=seed) * std_D @ rotation(dim, seed)).covariance() for seed in (1, 2)
    )
    monkeypatch.setattr(frechet, "BLOCK", 32)
    mean, taken, fast_way = torch.zeros(dim), [], frechet._fast_nuclear_norm

    def spy(*args):
        taken.append(fast_way(*args))
        return taken[-1]

    monkeypatch.setattr(frechet, "_fast_nuclear_norm", spy)
    found = frechet_distance(mean, cov_1, mean, cov_2)
    assert (taken[0] is not None) == fast
    monkeypatch.setattr(frechet, "_fast_nuclear_norm", lambda *args: None)
    assert frechet_distance(mean, cov_1, mean, cov_2) == pytest.approx(found, rel=1e-11)


@pytest.mark.parametrize("scale", [1e-150, 1e-100, 1e-20, 1e20, 1e100, 1e150])
@pytest.mark.parametrize("n", [30, 400])  # fewer samples than features, and more
def test_features_of_any_scale_have_the_distance_of_that_scale(scale, n):
    x_ND, y_ND = normal(n, 48, seed=1), 1.3 * normal(n, 48, seed=2) + 0.1
    assert distance(scale * x_ND, scale * y_ND) / scale**2 == pytest.approx(distance(x_ND, y_ND), rel=1e-7)
    covariance = FeatureMoments.of(x_ND).covariance()
    expected = expected_floor(covariance, 400, 400)
    assert expected_floor(covariance * scale**2, 400, 400) / scale**2 == pytest.approx(expected, rel=1e-9)


def test_a_distance_beyond_float64_is_refused():
    with pytest.raises(ValueError, match="too large for float64"):
        frechet_distance(torch.tensor([1e200], dtype=torch.float64), torch.eye(1), torch.zeros(1), torch.eye(1))


def test_constant_features_add_nothing_and_cost_no_eigenvectors(monkeypatch):
    x_ND, y_ND = normal(200, 30, seed=1), 2 * normal(200, 30, seed=2)
    expected = distance(x_ND, y_ND)
    padded = [torch.cat([torch.full((200, 5), 7.0).double(), each], 1) for each in (x_ND, y_ND)]
    monkeypatch.setattr(torch.linalg, "eigh", lambda *_: pytest.fail("a singular covariance was factored"))
    assert distance(*padded) == pytest.approx(expected, rel=1e-12)
    assert distance(*(torch.full((9, 2), value).double() for value in (1, 3))) == 8  # nothing but means


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kind", ["constant", "collinear"])
def test_one_singular_covariance_takes_the_fast_way_on_either_side(kind, swapped, monkeypatch):
    x_ND, y_ND = normal(200, 30, seed=1), 2 * normal(200, 30, seed=2)
    x_ND[:, 7] = x_ND[:, 3] if kind == "collinear" else 0.0
    x, y = (FeatureMoments.of(each).covariance() for each in (x_ND, y_ND))
    lambda_D, vectors_DD = torch.linalg.eigh(y)
    root_DD = vectors_DD * lambda_D.sqrt() @ vectors_DD.T
    # One eigenvalue of the product is 0, and rounded: its root is 1e-8 of the others
    cross = torch.linalg.eigvalsh(root_DD @ x @ root_DD).clamp(min=0).sqrt().sum()
    mean = torch.zeros(30)
    monkeypatch.setattr(torch.linalg, "svdvals", lambda *_: pytest.fail("singular values were needed"))
    found = frechet_distance(mean, *((y, mean, x) if swapped else (x, mean, y)))
    assert found == pytest.approx((x.trace() + y.trace() - 2 * cross).item(), rel=1e-7)


def test_a_zero_variance_beside_covariances_is_no_covariance():
    broken = torch.eye(3)
    broken[0, 0], broken[0, 1], broken[1, 0] = 0.0, 0.5, 0.5
    for pair in ((broken, torch.eye(3)), (torch.eye(3), broken), (broken, broken)):
        with pytest.raises(ValueError, match="not positive semi-definite"):
            frechet_distance(torch.zeros(3), pair[0], torch.zeros(3), pair[1])


@pytest.mark.parametrize("name", ["eigvalsh", "eigh"])
def test_eigenvalues_that_do_not_converge_give_way_or_a_message(name, monkeypatch):
    def fails(*_):
        raise torch.linalg.LinAlgError("no convergence")

    n = 200 if name == "eigvalsh" else 20
    x_ND, y_ND = normal(n, 30, seed=1), 2 * normal(n, 30, seed=2)
    expected = distance(x_ND, y_ND)
    monkeypatch.setattr(torch.linalg, name, fails)
    if name == "eigvalsh":
        assert distance(x_ND, y_ND) == pytest.approx(expected, rel=1e-11)  # by singular values
    else:
        with pytest.raises(ValueError, match="no eigenvalues of a covariance were found"):
            distance(x_ND, y_ND)
