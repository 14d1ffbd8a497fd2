"""Files of statistics: an exact round trip, ADM's names, and what is no covariance."""

import json

import numpy as np
import pytest
import torch

from dit_moe.evaluation.sources.npz import is_verified_inception, open_npz, require_extractor, write_statistics
from dit_moe.extractors import inception
from dit_moe.metrics import FeatureSet

FEATURES = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
MU, SIGMA = np.zeros(3), np.eye(3)


class Extractor:
    """What statistics know of one."""

    def __init__(self, name="pixels", dim=6, sha256="a" * 64, is_fid=False):
        self.name, self.dim, self.sha256, self.is_fid = name, dim, sha256, is_fid

    def identity(self):
        return {"name": self.name, "sha256": self.sha256} | ({"dim": self.dim} if self.dim else {})


def written(path, spatial=True, **about):
    features = FeatureSet("here", 50, features_ND=FEATURES, spatial_NS=FEATURES[:, :2] ** 2 if spatial else None)
    write_statistics(path, features, Extractor(**about))
    return open_npz(path).statistics


NO_RECORD = r"is no record of one \(.*\); make it again"


@pytest.mark.parametrize("spatial", [True, False])
def test_written_statistics_are_read_to_the_last_bit(tmp_path, spatial):
    found = written(tmp_path / "s.npz", spatial)
    features = FeatureSet("here", 50, features_ND=FEATURES, spatial_NS=FEATURES[:, :2] ** 2)
    pairs = [(found.moments, features.moments)]
    pairs += [(found.spatial_moments, features.spatial_moments)] if spatial else []
    for read, meant in pairs:
        assert read.n == 50 and torch.equal(read.mean_D, meant.mean_D.double())
        assert torch.equal(read.covariance(), meant.covariance())
    assert (found.spatial_moments is None) == (not spatial)
    assert found.extractor == Extractor().identity()
    again = FeatureSet("file", 50, given_moments=found.moments, given_spatial_moments=found.spatial_moments)
    write_statistics(tmp_path / "again.npz", again, Extractor())
    assert open_npz(tmp_path / "again.npz").statistics.sha256 == found.sha256
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz", ".npz"]


def test_a_failed_write_leaves_the_old_file_where_adms_evaluator_finds_its_names_without_pickle(tmp_path):
    written(tmp_path / "s.npz")
    with pytest.raises(ValueError, match="1 samples have no covariance"):
        write_statistics(tmp_path / "s.npz", FeatureSet("here", 1, features_ND=FEATURES[:1]), Extractor())
    with np.load(tmp_path / "s.npz") as arrays:
        shapes = {name: arrays[name].shape for name in ("mu", "sigma", "mu_s", "sigma_s")}
        assert arrays["mu"].dtype == arrays["sigma_s"].dtype == np.float64
    assert shapes == {"mu": (6,), "sigma": (6, 6), "mu_s": (2,), "sigma_s": (2, 2)}


@pytest.mark.parametrize(
    "made_by, asked, message",
    [
        (
            {"name": "inception"},
            {},
            r"s.npz is of the features of inception \(weights aaaaaaaaaaaa\), not of pixels \(weights aaaaaaaaaaaa\): "
            r"name differ; choose --extractor inception, or make it again from images by --save-stats",
        ),
        ({"sha256": "b" * 64}, {}, r"pixels \(weights b{12}\), not of pixels \(weights a{12}\): sha256 differ"),
        ({}, {"dim": 3}, "dim differ"),
    ],
)
def test_statistics_of_another_space_are_refused_naming_both(tmp_path, made_by, asked, message):
    with pytest.raises(ValueError, match=message):
        require_extractor(written(tmp_path / "s.npz", **made_by), Extractor(**asked))
    np.savez(tmp_path / "lies.npz", mu=MU, sigma=SIGMA, extractor=recorded(name="pixels", dim=7))
    with pytest.raises(ValueError, match="dim differ"):
        require_extractor(open_npz(tmp_path / "lies.npz").statistics, Extractor(dim=3))
    unknown = written(tmp_path / "s.npz", dim=0)  # of an extractor that knows its width only once it was called
    assert unknown.extractor["dim"] == 6
    assert all(require_extractor(unknown, Extractor(dim=dim)) is None for dim in (0, 6))


def test_a_file_that_does_not_say_its_extractor_is_taken_with_a_warning_if_the_width_fits(tmp_path):
    np.savez(tmp_path / "s.npz", mu=MU, sigma=SIGMA)
    statistics = open_npz(tmp_path / "s.npz").statistics
    warning = require_extractor(statistics, Extractor(dim=3))
    assert "s.npz does not say which extractor made it" in warning and "taken for pixels" in warning
    with pytest.raises(ValueError, match=r"s.npz is of 3 features, but pixels .* has 6; choose another --extractor"):
        require_extractor(statistics, Extractor())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_singular_covariances_and_well_conditioned_ones_of_float32_are_covariances(tmp_path, scale):
    few, many = (np.random.default_rng(0).normal(size=(n, 40)) * scale for n in (5, 400))
    for sigma in (np.cov(few.T), np.cov(many.T).astype(np.float32), np.zeros((40, 40))):
        np.savez(tmp_path / "s.npz", mu=few.mean(0), sigma=sigma)
        assert open_npz(tmp_path / "s.npz").statistics.moments.covariance().dtype == torch.float64


def recorded(**changes):
    return json.dumps({"name": "own", "dim": 3, "sha256": "a" * 64, **changes})


def test_only_a_complete_record_of_the_verified_inception_makes_a_fid():
    official = {"name": "inception", "dim": 2048, "sha256": inception.SHA256, "resize": inception.RESIZE}
    assert is_verified_inception(official, 2048)
    assert not is_verified_inception(official, 2047) and not is_verified_inception(None, 2048)
    for change in ({"name": "own"}, {"dim": 2047}, {"sha256": "a" * 64}, {"resize": "bilinear"}):
        assert not is_verified_inception({**official, **change, "is_fid": True}, 2048)
    assert not is_verified_inception({"is_fid": True}, 2048)


def changed(value, *where):
    sigma = SIGMA.copy()
    for place in where:
        sigma[place] = value
    return sigma


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": MU}, "has mu but no sigma"),
        ({"mu": MU, "sigma": SIGMA, "mu_s": MU}, "has mu_s but no sigma_s"),
        ({"mu": MU, "sigma": SIGMA[:2]}, r"mu has shape \(3,\) and sigma \(2, 3\); wanted \[D\] and \[D, D\]"),
        ({"mu": MU[:0], "sigma": SIGMA[:0, :0]}, r"mu has shape \(0,\)"),
        ({"mu": MU + np.nan, "sigma": SIGMA}, "mu holds NaN or infinity"),
        ({"mu": MU, "sigma": changed(np.inf, (1, 1))}, "sigma holds NaN or infinity"),
        ({"mu": MU.astype(int), "sigma": SIGMA}, "mu has dtype int64; save it as float64"),
        ({"mu": MU, "sigma": changed(0.1, (0, 1))}, "sigma is no covariance, it is not symmetric"),
        ({"mu": MU, "sigma": changed(2, (0, 1), (1, 0))}, "sigma is no covariance, it has a negative eigenvalue"),
        ({"mu": MU, "sigma": SIGMA, "mu_s": MU, "sigma_s": -SIGMA}, "sigma_s is no covariance"),
        ({"mu": MU, "sigma": SIGMA, "n": np.array([5])}, r"n=\[5\] is no number of images"),
        ({"mu": MU, "sigma": SIGMA, "n": 1}, "n=1 is no number of images"),
        ({"mu": MU, "sigma": SIGMA, "extractor": "inception"}, NO_RECORD),
        ({"mu": MU, "sigma": SIGMA, "extractor": recorded(dim="3")}, NO_RECORD),
        ({"mu": MU, "sigma": SIGMA, "extractor": recorded(sha256=None)}, NO_RECORD),
    ],
)
def test_other_arrays_than_statistics_are_refused_naming_the_file_and_the_flag(tmp_path, arrays, message):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(ValueError, match=rf"wrong.npz.*{message}"):
        open_npz(tmp_path / "wrong.npz")
