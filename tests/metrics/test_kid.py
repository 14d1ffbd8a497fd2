import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from dit_moe.config import ConfigError
from dit_moe.metrics import METRICS, FeatureSet
from dit_moe.metrics.kid import KIDConfig, kernel_distance


def normal(n, d, seed, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


@pytest.mark.parametrize(
    "n, m, size, subsets, dtype, tolerance",  # kernels are of order 1; sums in another order
    [
        (300, 200, 50, 20, torch.float64, 1e-12),
        (200, 200, 200, 3, torch.float64, 1e-12),
        (300, 200, 50, 20, torch.float32, 1e-6),  # which it sums in float32
    ],
)
def test_it_equals_torch_fidelitys_over_the_same_subsets(n, m, size, subsets, dtype, tolerance):
    x, y = normal(n, 64, 1).to(dtype), normal(m, 64, 2, shift=0.3).to(dtype)
    settings = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": 2020, "verbose": False}
    oracle = kid_features_to_metric(x, y, kid_kernel="poly", **settings)
    found = kernel_distance(x, y, subsets, size)
    assert found.mean == pytest.approx(oracle["kernel_inception_distance_mean"], abs=tolerance)
    assert found.std == pytest.approx(oracle["kernel_inception_distance_std"], abs=tolerance)


def test_the_mean_over_draws_of_one_distribution_is_zero_at_any_count():
    draws = torch.tensor([kernel_distance(normal(20, 4, i), normal(20, 4, 1000 + i), 1).mean for i in range(400)])
    assert abs(draws.mean()) < 4 * draws.std() / 400**0.5  # four standard errors; these seeds give a fixed number


def sets(*counts):
    return [FeatureSet("made.npz", n, features_ND=normal(n, 2, n)) for n in counts]


def test_settings_are_those_of_the_config_whatever_was_called_and_notes_tell_what_counts_decide():
    assert METRICS.build(KIDConfig()).settings().items() >= {"subsets": 100, "seed": 2020}.items()
    assert METRICS.build(KIDConfig()).notes(*sets(2010, 2020)) == []  # subsets of 1000, as published
    metric = METRICS.build(KIDConfig(subsets=2))
    before = metric.settings()
    assert metric(*sets(450, 500)) and metric.settings() == before and before["subset_size"] is None
    (note,) = metric.notes(*sets(500, 450))
    assert note == "of all 450 images, so without a spread; published ones are means over subsets of 1000"
    first, second = METRICS.build(KIDConfig(subset_size=400)).notes(*sets(500, 450))
    assert first == "KID over subsets of 400 images; published ones have 1000"
    assert "no kid_subset_std" in second and "--kid-subset-size to at most 225" in second
    assert METRICS.build(KIDConfig(subset_size=7)).settings()["subset_size"] == 7


@pytest.mark.parametrize("size, told", [(10, True), (11, False), (20, False)])
def test_no_spread_is_told_between_subsets_that_are_over_half_of_a_set(size, told):
    metric, pair = METRICS.build(KIDConfig(subsets=4, subset_size=size)), sets(20, 50)
    assert list(metric(*pair)) == (["kid", "kid_subset_std"] if told else ["kid"])
    assert any("no kid_subset_std" in note for note in metric.notes(*pair)) != told


def test_one_image_has_no_unbiased_estimate_and_too_few_for_the_subset_size_asked_for_name_the_flag():
    with pytest.raises(ValueError, match="at least 2 images"):
        kernel_distance(normal(1, 2, 0), normal(20, 2, 1))
    with pytest.raises(ConfigError, match="subset_size=1 must be at least 2"):
        KIDConfig(subset_size=1)
    with pytest.raises(ValueError, match="lower --kid-subset-size to at most 20"):
        kernel_distance(normal(30, 2, 0), normal(20, 2, 1), subset_size=21)
