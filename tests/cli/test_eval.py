"""`dit-moe eval` and `python eval/fid.py`: inputs, options, and what they refuse."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_moe.data import DATASETS
from dit_moe.data.digits import DigitsConfig
from dit_moe.evaluation.extraction import Extraction
from dit_moe.evaluation.image_writer import write_images
from dit_moe.extractors.digits_cnn import DigitsCNNConfig, DigitsCNNExtractor
from dit_moe.extractors.inception import SHA256
from dit_moe.registry import Registry

from .conftest import cli

SCRIPT = Path(__file__).parents[2] / "eval" / "fid.py"


@pytest.fixture(scope="module")
def heldout():
    """100 held-out digits, (images [N, 8, 8, 1], labels)."""
    batch = DATASETS.build(DigitsConfig(), "heldout").__getitems__(range(100))
    return batch["images"].permute(0, 2, 3, 1).contiguous().numpy(), batch["labels"].numpy()


@pytest.fixture
def samples(heldout, tmp_path):
    """A folder with an images.npz of them."""
    folder = tmp_path / "samples"
    folder.mkdir()
    write_images(folder / "images.npz", *heldout)
    return folder


def evaluate(capsys, *words):
    """The report that the command prints."""
    capsys.readouterr()
    assert cli("eval", *words) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refuse(capsys, *words):
    """The one line that the command ends with."""
    capsys.readouterr()
    assert cli("eval", *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_the_script_prints_json_to_stdout_and_a_table_to_stderr(samples):
    command = [sys.executable, SCRIPT, samples, "digits", "--extractor", "digits_cnn64"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["fd_digits_cnn64"]["n"] == 100 and report["provenance"]["n_ref_images"] == 898
    assert "digits_cnn64" in done.stderr and "held-out" in done.stderr


def test_the_script_ends_with_2_and_one_line_for_bad_input(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "no.npz", "digits"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and "no.npz" in line


def test_out_holds_what_stdout_shows(samples, tmp_path, capsys):
    capsys.readouterr()
    assert cli("eval", samples, samples / "images.npz", "digits", "--out", tmp_path / "metrics.json") == 0
    assert (tmp_path / "metrics.json").read_text() == capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "metrics.features", "samples"}


def test_every_kind_of_input_that_holds_the_same_images_gives_the_same_distance(samples, heldout, tmp_path, capsys):
    images, labels = heldout
    folder = tmp_path / "png"
    for i, image in enumerate(images):
        (folder / str(labels[i])).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / str(labels[i]) / f"{i:03d}.png")
    np.savez(tmp_path / "adm.npz", images, labels)  # arr_0, arr_1
    np.savez_compressed(tmp_path / "small.npz", arr_0=images, labels=labels)
    evaluate(capsys, samples, "digits", "--features", tmp_path / "features")
    ways = [samples, samples / "images.npz", tmp_path / "adm.npz", tmp_path / "small.npz", folder]
    features = tmp_path / "features" / "samples_0"
    reports = [
        evaluate(capsys, way, "digits", "--extractor", "digits_cnn64", "--metrics", "fd") for way in [*ways, features]
    ]
    values = [report["fd_digits_cnn64"]["generated"] for report in reports]
    assert values == pytest.approx([values[0]] * 6, rel=1e-12)  # the folder is in another order
    swapped = evaluate(capsys, "digits/heldout", features, "--extractor", "digits_cnn64", "--metrics", "fd")
    assert swapped["provenance"]["n_ref_images"] == 100 and swapped["fd_digits_cnn64"]["n"] == 450


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


def test_statistics_that_do_not_say_their_network_never_make_a_fid(tmp_path, capsys):
    draw = np.random.default_rng(0).normal(size=(2, 500, 8))
    for name, rows in zip("ab", draw, strict=True):
        np.savez(tmp_path / f"{name}.npz", mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
    report = evaluate(capsys, tmp_path / "a.npz", tmp_path / "b.npz")
    assert report["fd_unverified"]["generated"] > 0 and report["provenance"]["extractor"]["is_fid"] is False
    assert "fid" not in report


OFFICIAL = {"name": "inception", "dim": 2048, "sha256": SHA256, "resize": "TensorFlow 1 bilinear to 299"}


@pytest.mark.parametrize(
    "stated, key",
    [
        ({}, None),
        ({"name": "inception", "dim": 8, "sha256": "0" * 64, "is_fid": True}, "fd_inception"),
        ({"name": "inception", "dim": 8, "sha256": SHA256, "is_fid": True}, "fd_inception"),
        (OFFICIAL | {"is_fid": True}, "fd_inception"),  # of 8 features
    ],
    ids=["nothing", "wrong hash", "wrong width", "width that lies"],
)
def test_a_file_that_claims_to_be_of_the_inception_makes_no_fid(tmp_path, stated, key, capsys):
    rows = np.random.default_rng(0).normal(size=(500, 8))
    moments = {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}
    np.savez(tmp_path / "a.npz", **moments, extractor=json.dumps(stated))
    if key is None:
        assert "extractor" in refuse(capsys, tmp_path / "a.npz", tmp_path / "a.npz")
        return
    report = evaluate(capsys, tmp_path / "a.npz", tmp_path / "a.npz")
    assert key in report and "fid" not in report and report["provenance"]["extractor"]["is_fid"] is False


def test_statistics_of_an_unnamed_network_as_samples_make_no_number_of_the_extractors_space(samples, tmp_path, capsys):
    rows = np.random.default_rng(0).normal(size=(500, 64))
    np.savez(tmp_path / "unnamed.npz", mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
    report = evaluate(capsys, tmp_path / "unnamed.npz", samples, "--extractor", "digits_cnn64", "--metrics", "fd")
    assert report["fd_unverified"]["n"] is None and "fd_digits_cnn64" not in report
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


@pytest.mark.parametrize(
    "words", [["digits/heldout", "{name: digits}"], ["{name: digits, size: 8}", "digits"]], ids=["words", "options"]
)
def test_the_digits_are_seen_by_their_own_network_unasked(words, capsys):
    assert "fd_digits_cnn64" in evaluate(capsys, *words, "--metrics", "fd")


def test_size_and_channels_hold_for_a_runs_images_too(finished_run, capsys, monkeypatch, tmp_path):
    (tmp_path / "channel_means.py").write_text("def means(images):\n    return images.float().mean((2, 3))\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "channel_means", raising=False)
    words = [finished_run, "count=40", "--seeds", "2", "--extractor", "channel_means:means", "--metrics", "fd"]
    report = evaluate(capsys, *words, "--channels", "3", "--size", "4")
    facts = report["provenance"]
    assert [each["image_shape"] for each in facts["samples"]] == [[3, 4, 4]] * 2
    assert facts["reference"]["image_shape"] == [3, 4, 4] and facts["extractor"]["dim"] == 3
    altered = [reason for reason in facts["not_comparable_because"] if "altered" in reason]
    assert len(altered) == 2


def test_kept_features_tell_how_their_images_were_made(finished_run, tmp_path, capsys):
    words = [finished_run, "count=40", "--seeds", "1", "--metrics", "fd"]
    live = evaluate(capsys, *words, "digits", "--features", tmp_path / "kept")["provenance"]
    sides = [tmp_path / "kept" / "samples_0", tmp_path / "kept" / "reference"]
    kept = evaluate(capsys, *sides, "--metrics", "fd")["provenance"]
    assert kept["not_comparable_because"] == live["not_comparable_because"]
    assert any("as many images of each class" in reason for reason in kept["not_comparable_because"])
    evaluate(capsys, *words, "{name: digits, size: 16}", "--size", "16", "--features", tmp_path / "resized")
    sides = [tmp_path / "resized" / "samples_0", tmp_path / "resized" / "reference"]
    reasons = evaluate(capsys, *sides, "--metrics", "fd")["provenance"]["not_comparable_because"]
    assert any("resized or converted before" in reason for reason in reasons)


def test_one_set_under_two_names_is_not_two_seeds(finished_run, tmp_path, capsys):
    words = ["count=40", "--seeds", "1"]
    evaluate(capsys, finished_run, *words, "--save-npz", tmp_path / "saved.npz")
    report = evaluate(capsys, finished_run, tmp_path / "saved.npz", "digits", *words, "--metrics", "fd")
    assert any("saved.npz is among the samples twice" in note for note in report["warnings"])


def test_images_are_not_put_beside_what_says_how_others_were_made(finished_run, tmp_path, capsys):
    assert cli("sample", finished_run, "count=20", "--out", tmp_path / "made") == 0
    before = (tmp_path / "made" / "images.npz").read_bytes()
    words = ["count=30", "--seeds", "1", "--save-npz", tmp_path / "made" / "images.npz"]
    assert "sample.json says how the images.npz beside it was made" in refuse(capsys, finished_run, "digits", *words)
    folder = [tmp_path / "made", "digits", "--save-npz", tmp_path / "made" / "images.npz"]
    assert "would overwrite what is read" in refuse(capsys, *folder)
    assert (tmp_path / "made" / "images.npz").read_bytes() == before


def test_without_words_the_usage_is_shown(capsys):
    assert cli("eval") == 2
    assert "usage: dit-moe eval" in capsys.readouterr().err


def test_a_run_is_sampled_as_it_is_judged_and_leaves_no_images(finished_run, tmp_path, capsys):
    before = sorted(finished_run.rglob("*"))
    report = evaluate(capsys, finished_run, "digits", "count=40", "--seeds", "2", "--out", tmp_path / "m.json")
    assert sorted(finished_run.rglob("*")) == before
    assert not [path for path in (tmp_path / "m.features").rglob("*") if path.suffix in (".npz", ".png")]
    first, second = report["provenance"]["samples"]
    assert first["experiment"]["sample"]["seed"] == 0 and second["experiment"]["sample"]["seed"] == 1
    assert first["kind"] == "run" and first["weights_sha256"] and first["active_experts"] > 0
    assert first["parameters"] > first["active_parameters"] and first["evaluations"] == 4
    assert report["fd_digits_cnn64"]["n"] == 40 and report["fd_digits_cnn64"]["seeds"] == 2

    assert cli("sample", finished_run, "count=40", "--out", tmp_path / "written") == 0
    written = evaluate(capsys, tmp_path / "written", "digits", "--metrics", "fd")
    alone = evaluate(capsys, finished_run, "count=40", "--seeds", "1", "--metrics", "fd")  # against what it trained on
    generated, floor = (alone["fd_digits_cnn64"][name] for name in ("generated", "floor"))
    assert generated == pytest.approx(written["fd_digits_cnn64"]["generated"], rel=1e-9) and generated > floor > 0
    assert written["provenance"]["samples"][0]["sample"]["weights_sha256"] == first["weights_sha256"]


def test_save_npz_writes_the_images_that_were_judged(finished_run, tmp_path, capsys):
    words = ["count=37", "--seeds", "1"]
    evaluate(capsys, finished_run, "digits", *words, "--save-npz", tmp_path / "judged.npz")
    assert cli("sample", finished_run, "count=37", "--out", tmp_path / "sampled") == 0
    judged, sampled = np.load(tmp_path / "judged.npz"), np.load(tmp_path / "sampled" / "images.npz")
    assert np.array_equal(judged["arr_0"], sampled["arr_0"]) and np.array_equal(judged["labels"], sampled["labels"])


@pytest.mark.parametrize(
    "words, message",
    [
        (["digit"], "did you mean 'digits'"),
        (["gone.npz"], "gone.npz"),
        (["digits", "--extractor", "digits_cnn"], "did you mean 'digits_cnn64'"),
        (["digits", "--metrics", "fd,kit"], "'kit' is no metric; did you mean 'kid'"),
        (["digits", "--metrics", "fid"], "--metrics fid is of the Inception network.*--extractor inception"),
        (["digits", "--metrics", "sfd"], "sfd needs spatial features"),
        (["digits", "--kid-subset-size", "101"], "--kid-subset-size"),
        (["digits", "--metrics", "fd", "--kid-subset-size", "10"], "kid is not among the metrics"),
        (["digits", "--range", "1"], "--range 1 must be two numbers"),
        (["digits", "--size", "0"], "--size 0 must be at least 1"),
        (["digits", "--workers", "-1"], "--workers -1 must be at least 0"),
        (["digits", "--seeds", "2"], "--seeds is for runs"),
        (["digits", "--seeds", "0"], "--seeds 0"),
        (["digits", "--metrics", ","], "--metrics"),
        (["digits", "--kid-subset-size", "0"], "--kid-subset-size"),
        (["digits", "--sampling", "dit"], "--sampling is for runs"),
        (["digits", "count=5"], "count=5: only for runs"),
        (["digits", "--out", "no/where/m.json"], "--out no/where/m.json: the folder no/where does not exist"),
        (["digits", "--out", "."], "--out . is a folder; name a file"),
        (["digits", "--save-stats", "no/where/m.npz"], "--save-stats no/where/m.npz: the folder no/where"),
        (["digits", "--recipe", "adm-50k"], "--recipe adm-50k does not hold: 100 generated images instead of 50 000"),
        (["digits", "--out", "metrics.txt"], "--out metrics.txt should end in .json"),
        (["digits", "--save-npz", "images.zip"], "--save-npz images.zip should end in .npz"),
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
    assert "holds images.npz, which is no features" in refuse(capsys, file, "digits", "--features", samples)
    assert file.read_bytes() == before and list(samples.iterdir()) == [file]


def test_words_may_stand_on_either_side_of_options(samples, capsys):
    report = evaluate(capsys, samples, "--metrics", "fd", "digits")
    assert report["fd_digits_cnn64"]["n"] == 100


def test_a_fid_of_few_images_has_to_be_asked_for(tmp_path, capsys, monkeypatch):
    class Official(DigitsCNNExtractor):
        is_fid = True

    monkeypatch.setattr(
        Registry,
        "factory",
        lambda self, config, old=Registry.factory: (
            Official if isinstance(config, DigitsCNNConfig) else old(self, config)
        ),
    )
    few = refuse(capsys, "digits/heldout", "digits", "--metrics", "fd")
    assert "FID of 450 images" in few and "--allow-few" in few
    report = evaluate(capsys, "digits/heldout", "digits", "--metrics", "fd", "--allow-few")
    assert report["fid"]["n"] == 450


def test_what_metrics_lack_shows_before_the_work(finished_run, samples, heldout, tmp_path, capsys, monkeypatch):
    images, labels = heldout
    write_images(tmp_path / "odd.npz", images, labels + 10)
    write_images(tmp_path / "two.npz", images[:2], labels[:2])
    np.savez(tmp_path / "wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    evaluate(capsys, samples, "digits", "--features", tmp_path / "features")
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


def test_what_a_default_metric_lacks_leaves_it_out(heldout, tmp_path, capsys):
    images, labels = heldout
    write_images(tmp_path / "odd.npz", images[:4], labels[:4] + 10)
    report = evaluate(capsys, tmp_path / "odd.npz", "digits")
    assert report["fd_digits_cnn64"]["n"] == 4 and "class_accuracy" not in report
    assert any(note.startswith("left out: ") and "knows 10 classes" in note for note in report["warnings"])


def test_the_same_images_on_both_sides_are_said_to_be(samples, capsys):
    report = evaluate(capsys, samples, samples / "images.npz", "--extractor", "digits_cnn64", "--metrics", "fd")
    assert any("are the same images" in note for note in report["warnings"])
    assert any("are the same images" in reason for reason in report["provenance"]["not_comparable_because"])


def test_different_models_are_no_sampling_seeds(finished_run, tmp_path, capsys):
    other = shutil.copytree(finished_run, tmp_path / "other")
    newest = max((other / "checkpoints").iterdir())
    shutil.rmtree(newest)
    words = ["count=40", "--seeds", "1"]
    assert "evaluate them one by one" in refuse(capsys, finished_run, other, "digits", *words)


def arrays(**others):
    return {"arr_0": np.zeros((60, 8, 8, 1), np.uint8), "labels": np.zeros(60, np.int64)} | others


@pytest.mark.parametrize(
    "content, message",
    [
        (arrays(arr_0=np.full((60, 8, 8, 1), np.nan)), "image 0.*NaN"),
        (arrays(arr_0=np.full((60, 8, 8, 1), np.inf, np.float32)), "image 0.*[Ii]nfinit"),
        (arrays(arr_0=np.full((60, 8, 8, 1), 0.5, np.float32)), "--range"),
        (arrays(arr_0=np.zeros((60, 8, 8, 2), np.uint8)), "channels"),
        (arrays(arr_0=np.zeros((60, 8, 8, 3), np.uint8)), "--channels|1 channel"),
        (arrays(arr_0=np.zeros((60, 9, 9, 1), np.uint8)), "multiple of 8"),
        (arrays(arr_0=np.zeros((60, 16, 16, 1), np.uint8)), "make them equal, for instance by --size"),
        (arrays(arr_0=np.zeros((0, 8, 8, 1), np.uint8), labels=np.zeros(0, np.int64)), "0|nothing|empty"),
        (arrays(arr_0=np.zeros((1, 8, 8, 1), np.uint8), labels=np.zeros(1, np.int64)), "1 image"),
        (arrays(labels=np.zeros(59, np.int64)), "labels"),
    ],
    ids=["nan", "inf", "float", "two channels", "colour", "side", "size", "none", "one", "labels"],
)
def test_bad_images_are_refused_in_one_line_and_leave_an_earlier_result_alone(tmp_path, content, message, capsys):
    np.savez(tmp_path / "bad.npz", **content)
    out = tmp_path / "metrics.json"
    out.write_text("earlier")
    assert re.search(message, refuse(capsys, tmp_path / "bad.npz", "digits", "--out", out))
    assert out.read_text() == "earlier"


def test_float_images_are_taken_with_their_range_and_refused_outside_it(heldout, tmp_path, capsys):
    images, labels = heldout
    floats = images.astype(np.float32) / 127.5 - 1
    np.savez(tmp_path / "floats.npz", arr_0=floats, labels=labels)
    np.savez(tmp_path / "bytes.npz", arr_0=images, labels=labels)
    by_range = evaluate(capsys, tmp_path / "floats.npz", "digits", "--range=-1,1")
    plain = evaluate(capsys, tmp_path / "bytes.npz", "digits")
    assert by_range["fd_digits_cnn64"] == plain["fd_digits_cnn64"]
    assert "--range" in refuse(capsys, tmp_path / "floats.npz", "digits", "--range=0,1")


def test_folders_that_cannot_be_judged_are_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "empty" in refuse(capsys, tmp_path / "empty", "digits")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for side in (8, 16):
        Image.new("L", (side, side)).save(mixed / f"{side}.png")
    assert "--size" in refuse(capsys, mixed, "digits")


def test_features_of_other_images_are_refused_and_kept(samples, heldout, tmp_path, capsys):
    evaluate(capsys, samples, "digits", "--out", tmp_path / "m.json")
    images, labels = heldout
    write_images(samples / "images.npz", images[::-1].copy(), labels)
    assert "samples_0 holds features with sha256=" in refuse(capsys, samples, "digits", "--out", tmp_path / "m.json")
