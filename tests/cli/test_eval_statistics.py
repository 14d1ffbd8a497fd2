"""`dit-moe eval` on files of statistics, and which numbers may be called FID."""

import json

import numpy as np
import pytest

from dit_moe.extractors.digits_cnn import DigitsCNNConfig, DigitsCNNExtractor
from dit_moe.extractors.inception import RESIZE, SHA256
from dit_moe.registry import Registry

from .evaluating import evaluate, refuse


def test_saved_statistics_stand_in_for_either_side(samples, tmp_path, capsys):
    one, other = tmp_path / "one.npz", tmp_path / "other.npz"
    told = evaluate(capsys, samples, "--extractor", "digits_cnn64", "--save-stats", one)
    assert told == {"saved": str(one), "count": 100}
    whole = evaluate(capsys, "digits", samples, "--metrics", "fd", "--extractor", "digits_cnn64", "--save-stats", other)
    wanted = whole["fd_digits_cnn64"]["generated"]
    for words in (["digits", one], [other, samples], [other, one]):
        report = evaluate(capsys, *words, "--extractor", "digits_cnn64", "--metrics", "fd")
        assert report["fd_digits_cnn64"]["generated"] == pytest.approx(wanted, rel=1e-9), words
        assert report["fd_digits_cnn64"]["n"] == 898 and report["fd_digits_cnn64"]["n_reference"] == 100


def test_a_file_that_claims_to_be_of_the_inception_makes_no_fid(tmp_path, capsys):
    stated = {"name": "inception", "dim": 2048, "sha256": SHA256, "resize": RESIZE, "is_fid": True}  # of 8 features
    np.savez(tmp_path / "a.npz", mu=np.zeros(8), sigma=np.eye(8), extractor=json.dumps(stated))
    report = evaluate(capsys, tmp_path / "a.npz", tmp_path / "a.npz")
    assert "fd_inception" in report and "fid" not in report and report["provenance"]["extractor"]["is_fid"] is False


def test_statistics_that_do_not_say_their_network_make_no_fid_and_no_number_of_an_extractors_space(
    samples, tmp_path, capsys
):
    rows = np.random.default_rng(0).normal(size=(500, 64))
    np.savez(tmp_path / "unnamed.npz", mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
    for words in ([samples, "--extractor", "digits_cnn64"], [tmp_path / "unnamed.npz"]):
        report = evaluate(capsys, tmp_path / "unnamed.npz", *words, "--metrics", "fd")
        assert report["fd_unverified"]["n"] is None and not {"fid", "fd_digits_cnn64"} & report.keys()
        assert report["provenance"]["extractor"]["is_fid"] is False
        assert any("does not say which extractor" in note for note in report["warnings"])


def test_statistics_that_say_their_network_can_be_held_against_published_ones_that_do_not(samples, tmp_path, capsys):
    own, published = tmp_path / "own.npz", tmp_path / "published.npz"
    evaluate(capsys, samples, "--extractor", "digits_cnn64", "--save-stats", own)
    with np.load(own) as arrays:
        np.savez(published, mu=arrays["mu"] + 1, sigma=arrays["sigma"])
    report = evaluate(capsys, own, published)
    assert report["fd_digits_cnn64"]["generated"] == pytest.approx(64)
    assert any("published.npz does not say which extractor made it" in note for note in report["warnings"])
    assert evaluate(capsys, published, own)["fd_unverified"]["generated"] == pytest.approx(64)
    assert "--metrics fid is of the Inception" in refuse(capsys, own, published, "--metrics", "fid")
    with np.load(own) as arrays:
        other = json.loads(str(arrays["extractor"])) | {"sha256": "0" * 64}
        np.savez(published, mu=arrays["mu"], sigma=arrays["sigma"], extractor=json.dumps(other))
    assert "different extractors, or weights" in refuse(capsys, own, published)
    named = refuse(capsys, own, own, "--extractor", "inception", "--weights", "gone.pth")
    assert "gone.pth" in named  # an extractor that is asked for is not passed over


def test_a_fid_of_few_images_has_to_be_asked_for(tmp_path, capsys, monkeypatch):
    class Official(DigitsCNNExtractor):
        is_fid = True

    factory = Registry.factory
    official = lambda self, config: Official if isinstance(config, DigitsCNNConfig) else factory(self, config)  # noqa: E731
    monkeypatch.setattr(Registry, "factory", official)
    few = refuse(capsys, "digits/heldout", "digits", "--metrics", "fd")
    assert "FID of 450 images" in few and "--allow-few" in few
    report = evaluate(capsys, "digits/heldout", "digits", "--metrics", "fd", "--allow-few")
    assert report["fid"]["n"] == 450
