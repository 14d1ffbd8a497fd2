import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_moe.metrics import FeatureMoments

REL = 1e-12  # float64 sums of some hundred terms; worst of 2000 cases 4.1e-14


def close(a, b):
    return (a - b).abs().max() <= REL * b.abs().max()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    offset=st.sampled_from([0.0, -3.0, 1000.0]),
    cuts=st.lists(st.integers(0, 90), max_size=8),
    reverse=st.booleans(),
)
def test_any_batching_in_any_order_equals_numpys_covariance(seed, offset, cuts, reverse):
    x_ND = np.random.default_rng(seed).normal(offset, 2, (90, 5))
    batches = torch.from_numpy(x_ND).tensor_split(sorted(cuts))  # empty batches included
    total = FeatureMoments.of(torch.empty(0, 5))
    for batch in batches[::-1] if reverse else batches:
        total = total.merge(FeatureMoments.of(batch))
    assert total.n == 90
    assert close(total.mean_D, torch.from_numpy(x_ND.mean(0)))
    assert close(total.covariance(), torch.from_numpy(np.cov(x_ND, rowvar=False)))


def test_merging_is_the_same_from_either_side_and_grouped_either_way():
    a, b, c = (FeatureMoments.of(torch.randn(n, 4) + n) for n in (3, 40, 17))
    left, right = a.merge(b).merge(c), c.merge(b.merge(a))
    assert close(left.mean_D, right.mean_D) and close(left.m2_DD, right.m2_DD)


def test_float32_features_are_summed_in_float64():
    x_ND = torch.randn(2000, 3) + 1000
    assert close(FeatureMoments.of(x_ND).covariance(), torch.from_numpy(np.cov(x_ND.double().numpy(), rowvar=False)))


def test_one_sample_has_no_covariance():
    with pytest.raises(ValueError, match="1 samples have no covariance"):
        FeatureMoments.of(torch.ones(1, 3)).covariance()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused_naming_the_sample(value):
    features = torch.zeros(4, 3)
    features[2, 1] = value
    with pytest.raises(ValueError, match="sample 2"):
        FeatureMoments.of(features)


def test_features_must_be_a_matrix():
    with pytest.raises(ValueError, match=r"shape \(4, 3, 1\); wanted \[N, D\]"):
        FeatureMoments.of(torch.zeros(4, 3, 1))
