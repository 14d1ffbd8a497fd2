"""What `dit-moe eval` refuses: in one line, before the work, with earlier results left alone."""

import re

import numpy as np
import pytest
import torch

from dit_moe.evaluation.extraction import Extraction
from tests.data.examples import encoded, pixels, write_tree
from tests.npz_files import write_images

from .conftest import evaluate, refuse


@pytest.mark.parametrize(
    "words, message",
    [
        (["digit"], "did you mean 'digits'"),
        (["digits", "--metrics", "fid"], "--metrics fid is of the Inception network.*--extractor inception"),
        (["digits", "--metrics", "sfd"], "sfd needs spatial features"),
        (["digits", "--kid-subset-size", "101"], "--kid-subset-size"),
        (["digits", "--metrics", "fd", "--kid-subset-size", "10"], "kid is not among the metrics"),
        (["digits", "--seeds", "2"], "--seeds is for runs"),
        (["digits", "--sampling", "dit"], "--sampling is for runs"),
        (["digits", "count=5"], "count=5: only for runs"),
        (["digits", "--out", "no/where/m.json"], "--out no/where/m.json: the folder no/where does not exist"),
        (["digits", "--out", "."], "--out . is a folder; name a file"),
        (["digits", "--recipe", "adm-50k"], "--recipe adm-50k does not hold: 100 generated images instead of 50 000"),
        (["digits", "--out", "metrics.txt"], "--out metrics.txt does not end in .json"),
        (["digits", "--save-npz", "images.zip"], "--save-npz images.zip does not end in .npz"),
        (["images.npz", "digits", "--save-stats", "all.npz"], "--save-stats takes one set of SAMPLES"),
        (["digits", "--extractor", "inception", "--weights", "gone.pth"], "gone.pth"),
        (["digits", "--extractor", "digits_cnn64", "--weights", "gone.pth"], "--weights: the extractor digits_cnn64"),
        (["digits", "--extractor", "no.such:thing"], "no.such"),
        ([], "REFERENCE"),
    ],
)
def test_a_bad_option_is_refused_naming_it(samples, words, message, capsys, monkeypatch):
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("off"))
    )
    monkeypatch.setenv("TORCH_HOME", str(samples / "none"))
    monkeypatch.chdir(samples)
    assert re.search(message, refuse(capsys, samples, *words))


def test_nothing_that_is_read_is_ever_overwritten(samples, tmp_path, capsys):
    file = samples / "images.npz"
    before = file.read_bytes()
    for option in ("--save-npz", "--save-stats"):
        assert "would overwrite what is read" in refuse(capsys, file, "digits", option, file)
        assert "would overwrite what is read" in refuse(capsys, "digits/heldout", file, option, file)
    twice = ["--save-npz", tmp_path / "a.npz", "--save-stats", tmp_path / "a.npz"]
    assert "would overwrite what is read or written" in refuse(capsys, file, "digits", *twice)
    assert "holds images.npz, which is no folder of features" in refuse(capsys, file, "digits", "--features", samples)
    assert file.read_bytes() == before and list(samples.iterdir()) == [file]


def test_what_a_metric_needs_and_does_not_get_is_refused_before_the_work(
    finished_run, samples, heldout, tmp_path, capsys, monkeypatch
):
    images, labels = heldout
    write_images(tmp_path / "odd.npz", images, labels + 10)
    write_images(tmp_path / "two.npz", images[:2], labels[:2])
    np.savez(tmp_path / "wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    evaluate(capsys, samples, "digits", "--metrics", "fd", "--features", tmp_path / "features")
    (tmp_path / "features" / "samples_0" / "00001.safetensors").unlink()
    worked = []
    monkeypatch.setattr(Extraction, "run", lambda self, *args: worked.append(self))
    run = [finished_run, "count=40", "--seeds", "1"]
    accuracy, pr = ["--metrics", "class_accuracy"], ["--metrics", "pr"]
    assert "knows 10 classes; leave class_accuracy out" in refuse(capsys, tmp_path / "odd.npz", "digits", *accuracy)
    assert "k=3" in refuse(capsys, tmp_path / "two.npz", "digits", *pr)
    assert "of 7 features" in refuse(capsys, *run, tmp_path / "wide.npz")
    assert "of 7 features" in refuse(capsys, tmp_path / "wide.npz", "digits", "--extractor", "digits_cnn64")
    assert "00001.safetensors is not there" in refuse(capsys, *run, tmp_path / "features" / "samples_0")
    assert not worked


def test_a_default_metric_without_what_it_needs_is_left_out(heldout, tmp_path, capsys):
    images, labels = heldout
    write_images(tmp_path / "odd.npz", images[:4], labels[:4] + 10)
    report = evaluate(capsys, tmp_path / "odd.npz", "digits")
    assert report["fd_digits_cnn64"]["n"] == 4 and "class_accuracy" not in report
    assert any(note.startswith("left out: ") and "knows 10 classes" in note for note in report["warnings"])
    named = write_tree(
        tmp_path / "n", {f"{name}/{i}.png": encoded(pixels(i, 8, 8)) for name in ("ant", "bee") for i in (1, 2)}
    )
    report = evaluate(capsys, named, "digits", "--channels", "1")
    assert any(
        "n has 2 classes, ant first, and digits_cnn64 knows 10, by number" in note for note in report["warnings"]
    )


@pytest.mark.parametrize(
    "shape, labels, message",
    [
        ((60, 8, 8, 2), 60, "channels"),
        ((60, 8, 8, 3), 60, "--channels|1 channel"),
        ((60, 9, 9, 1), 60, "multiple of 8"),
        ((60, 16, 16, 1), 60, "make them equal, for instance by --size"),
        ((0, 8, 8, 1), 0, "0|nothing|empty"),
        ((1, 8, 8, 1), 1, "1 image"),
        ((60, 8, 8, 1), 59, "labels"),
    ],
)
def test_bad_images_are_refused_in_one_line_and_leave_an_earlier_result_alone(tmp_path, shape, labels, message, capsys):
    np.savez(tmp_path / "bad.npz", arr_0=np.zeros(shape, np.uint8), labels=np.zeros(labels, np.int64))
    out = tmp_path / "metrics.json"
    out.write_text("earlier")
    assert re.search(message, refuse(capsys, tmp_path / "bad.npz", "digits", "--out", out))
    assert out.read_text() == "earlier"
