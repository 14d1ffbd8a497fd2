import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_moe.metrics import FeatureMoments, moments

REL = 1e-12  # float64 sums of some hundred terms; worst of 2000 cases 4.1e-14


def close(a, b):
    return (a - b).abs().max() <= REL * b.abs().max()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    offset=st.sampled_from([0.0, -3.0, 1000.0]),
    chunk=st.integers(1, 100),
)
def test_moments_from_chunks_of_any_size_are_numpys(seed, offset, chunk):
    x_ND = np.random.default_rng(seed).normal(offset, 2, (90, 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "CHUNK", chunk)
        total = FeatureMoments.of(torch.from_numpy(x_ND))
    assert total.n == 90
    assert close(total.mean_D, torch.from_numpy(x_ND.mean(0)))
    assert close(total.covariance(), torch.from_numpy(np.cov(x_ND, rowvar=False)))


def test_float32_features_are_summed_in_float64():
    x_ND = torch.randn(2000, 3) + 1000
    assert close(FeatureMoments.of(x_ND).covariance(), torch.from_numpy(np.cov(x_ND.double().numpy(), rowvar=False)))


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_samples_have_no_covariance(n):
    with pytest.raises(ValueError, match=f"{n} samples have no covariance"):
        FeatureMoments.of(torch.ones(n, 3)).covariance()


def test_features_must_be_a_matrix():
    with pytest.raises(ValueError, match=r"shape \(4, 3, 1\); wanted \[N, D\]"):
        FeatureMoments.of(torch.zeros(4, 3, 1))
