"""`dit-moe eval` and `python eval/fid.py`: what they take, what they leave, and which numbers may be called FID."""

import hashlib
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_moe.data import DATASETS
from dit_moe.data.digits import DigitsConfig
from dit_moe.extractors.digits_cnn import DigitsCNNConfig, DigitsCNNExtractor
from dit_moe.extractors.inception import RESIZE, SHA256
from dit_moe.registry import Registry

from .conftest import CONFIG, SMALL, cli, evaluate, refuse

SCRIPT = Path(__file__).parents[2] / "eval" / "fid.py"


def test_the_script_prints_json_to_stdout_and_a_table_to_stderr_and_out_holds_what_stdout_shows(
    samples, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "metrics.json"
    words = [samples, samples / "images.npz", "digits", "--metrics", "fd", "--out", out]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    stdout, stderr = capsys.readouterr()
    assert ended.value.code == 0 and out.read_text() == stdout
    report = json.loads(stdout)
    assert report["fd_digits_cnn64"]["n"] == 100 and report["provenance"]["n_ref_images"] == 898
    assert "digits_cnn64" in stderr and "held-out" in stderr
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "metrics.features", "samples"}


def test_every_kind_of_input_that_holds_the_same_images_gives_the_same_distance(samples, heldout, tmp_path, capsys):
    images, labels = heldout
    folder = tmp_path / "png"
    for i, image in enumerate(images):
        (folder / str(labels[i])).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / str(labels[i]) / f"{i:03d}.png")
    np.savez(tmp_path / "adm.npz", images, labels)  # arr_0, arr_1
    np.savez_compressed(tmp_path / "small.npz", arr_0=images, labels=labels)
    evaluate(capsys, samples, "digits", "--metrics", "fd", "--features", tmp_path / "features")
    features = tmp_path / "features" / "samples_0"
    ways = [samples, tmp_path / "adm.npz", tmp_path / "small.npz", folder, features]
    reports = [evaluate(capsys, way, "{name: digits}", "--metrics", "fd") for way in ways]
    values = [report["fd_digits_cnn64"]["generated"] for report in reports]
    assert values == pytest.approx([values[0]] * 5, rel=1e-12)  # the folder is in another order
    swapped = evaluate(capsys, "digits/heldout", features, "--metrics", "fd")
    assert swapped["provenance"]["n_ref_images"] == 100 and swapped["fd_digits_cnn64"]["n"] == 450


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


def test_code_that_a_runs_config_names_is_run_only_if_the_command_names_it_too(a_run, capsys, monkeypatch, tmp_path):
    marker = tmp_path / "it_ran"
    code = f"open({str(marker)!r}, 'w')\ndef means(images):\n    return images.float().mean((2, 3))\n"
    (tmp_path / "code_of_a_run.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    path = "code_of_a_run:means"
    words = ["train", CONFIG, "--run", a_run, *SMALL, f"eval.extractor={{name: function, path: '{path}'}}"]
    assert cli(*words, "train.steps=5") == 0
    marker.unlink(missing_ok=True)
    refused = f"eval.extractor of the run is the function {path}, whose code would run; if you trust it, give --extrac"
    assert refused in refuse(capsys, a_run)
    assert cli("dial", a_run) == 2 and refused in capsys.readouterr().err
    assert cli("sample", a_run) == 0 and not marker.exists()
    assert "fd_function_code_of_a_run_means" in evaluate(capsys, a_run, "--extractor", path)
    assert marker.exists()


def test_a_relative_path_of_a_run_leads_where_it_did_when_the_run_was_started(
    a_run, samples, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    words = ["train", CONFIG, "--run", a_run, *SMALL, "eval.reference=samples"]
    assert cli(*words, "train.steps=5") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "samples").mkdir()  # of that name, but not what was named
    used = evaluate(capsys, a_run, "--seeds", 1, "--metrics", "fd")["provenance"]
    assert used["reference"]["count"] == 100
    samples.rename(tmp_path / "elsewhere" / "moved")
    assert "samples has no images" in (told := refuse(capsys, a_run)) and "name a REFERENCE behind the run" in told


def test_kept_features_tell_how_their_images_were_made(finished_run, tmp_path, capsys):
    words = [finished_run, "count=40", "--seeds", "1", "--metrics", "fd"]
    live = evaluate(capsys, *words, "digits", "--features", tmp_path / "kept")["provenance"]
    sides = [tmp_path / "kept" / "samples_0", tmp_path / "kept" / "reference"]
    kept = evaluate(capsys, *sides, "--metrics", "fd")["provenance"]
    assert kept["not_comparable_because"] == live["not_comparable_because"]
    assert any("as many images of each class" in reason for reason in kept["not_comparable_because"])
    assert "made of images of 8×8 pixels, which --size 16 cannot change" in refuse(capsys, *sides, "--size", 16)
    assert "made of images of 1 channel, which --channels 3 cannot" in refuse(capsys, *sides, "--channels", 3)


def test_kept_features_of_altered_images_stay_marked(heldout, tmp_path, capsys):
    images, labels = heldout
    np.savez(tmp_path / "images.npz", arr_0=images.astype(np.float32) / 255 * 2 - 1, labels=labels)
    words = ["digits", "--metrics", "fd"]
    live = evaluate(capsys, tmp_path / "images.npz", *words, "--range=-1,1", "--features", tmp_path / "kept")
    again = evaluate(capsys, tmp_path / "kept" / "samples_0", *words)
    for report, shown in ((live, "the images were altered"), (again, "resized or converted before")):
        assert any(shown in reason for reason in report["provenance"]["not_comparable_because"])


def test_images_are_not_put_beside_what_says_how_others_were_made(finished_run, tmp_path, capsys):
    assert cli("sample", finished_run, "count=20", "--out", tmp_path / "made") == 0
    before = (tmp_path / "made" / "images.npz").read_bytes()
    words = ["count=30", "--seeds", "1", "--save-npz", tmp_path / "made" / "images.npz"]
    assert "sample.json says how the images.npz beside it was made" in refuse(capsys, finished_run, "digits", *words)
    folder = [tmp_path / "made", "digits", "--save-npz", tmp_path / "made" / "images.npz"]
    assert "would overwrite what is read" in refuse(capsys, *folder)
    assert (tmp_path / "made" / "images.npz").read_bytes() == before


def test_a_run_is_sampled_while_it_is_evaluated_and_leaves_no_images_unless_asked_to(finished_run, tmp_path, capsys):
    before = sorted(finished_run.rglob("*"))
    words = ["count=40", "--metrics", "fd"]
    report = evaluate(capsys, finished_run, "digits", *words, "--seeds", "2", "--out", tmp_path / "m.json")
    assert sorted(finished_run.rglob("*")) == before
    assert not [path for path in (tmp_path / "m.features").rglob("*") if path.suffix in (".npz", ".png")]
    first, second = report["provenance"]["samples"]
    assert first["experiment"]["sample"]["seed"] == 0 and second["experiment"]["sample"]["seed"] == 1
    assert first["kind"] == "run" and first["weights_sha256"] and first["active_experts"] > 0
    assert first["parameters"] > first["active_parameters"] and first["evaluations"] == 4
    assert report["fd_digits_cnn64"]["n"] == 40 and report["fd_digits_cnn64"]["seeds"] == 2

    assert cli("sample", finished_run, "count=40", "--out", tmp_path / "written") == 0
    written = evaluate(capsys, tmp_path / "written", "digits", "--metrics", "fd")
    saved = ["--seeds", "1", "--save-npz", tmp_path / "saved.npz"]
    alone = evaluate(capsys, finished_run, *words, *saved)  # against what it was trained on
    generated, floor = (alone["fd_digits_cnn64"][name] for name in ("generated", "floor"))
    assert generated == pytest.approx(written["fd_digits_cnn64"]["generated"], rel=1e-9) and generated > floor > 0
    assert written["provenance"]["samples"][0]["sample"]["weights_sha256"] == first["weights_sha256"]
    asked, sampled = np.load(tmp_path / "saved.npz"), np.load(tmp_path / "written" / "images.npz")
    assert np.array_equal(asked["arr_0"], sampled["arr_0"]) and np.array_equal(asked["labels"], sampled["labels"])


def test_there_is_a_floor_wherever_held_out_images_are_known_and_otherwise_the_report_says_why(
    finished_run, samples, tmp_path, capsys
):
    trained = DATASETS.build(DigitsConfig(), "train")
    images, labels = trained.__getitems__(range(100)).values()
    np.savez(tmp_path / "trained.npz", arr_0=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    words = ["--seeds", "1", "--metrics", "fd"]
    for reference in ([], [tmp_path / "trained.npz"], [f"eval.reference={tmp_path / 'trained.npz'}"], ["digits"]):
        report = evaluate(capsys, finished_run, *reference, "count=40", *words)
        assert report["fd_digits_cnn64"]["floor"] > 0 and not [each for each in report["warnings"] if "floor" in each]
    for sides, why in (
        ([finished_run, "digits/heldout", "count=40", *words[:2]], "are in the reference"),
        ([finished_run, tmp_path / "trained.npz", "count=451", *words[:2]], "held-out images, fewer than 451 samples"),
        ([samples, tmp_path / "trained.npz", "--extractor", "digits_cnn"], "names no held-out images"),
    ):
        report = evaluate(capsys, *sides, *words[2:])
        assert report["fd_digits_cnn64"]["floor"] is None
        assert [why in each for each in report["warnings"] if each.startswith("no floor")] == [True]
    assert report["fd_digits_cnn64"]["n"] == 100


def test_the_same_images_under_two_names_are_said_to_be(samples, tmp_path, capsys):
    again = shutil.copytree(samples, tmp_path / "again") / "images.npz"
    report = evaluate(capsys, samples, again, samples, "--extractor", "digits_cnn64", "--metrics", "fd")
    for told in (report["warnings"], report["provenance"]["not_comparable_because"]):
        assert any(f"{again} is among the samples twice" in each for each in told)
        assert sum("and the reference are the same images" in each for each in told) == 2


def test_features_that_were_kept_before_there_was_a_dial_are_still_the_run_s(finished_run):
    from dit_moe.evaluation.runs import decisive
    from dit_moe.experiments.run import open_image_run

    opened = {
        change: open_image_run(finished_run, change.split()).experiment
        for change in ("", "p=0.9", "target=[1,2] vary=time")
    }
    kept = {change: set(decisive(each)["sample"]) & {"target", "p", "vary"} for change, each in opened.items()}
    assert kept == {"": {"target"}, "p=0.9": {"target", "p"}, "target=[1,2] vary=time": {"target", "vary"}}


def test_features_that_were_kept_before_the_model_had_more_options_are_still_the_run_s():
    """The hash is of what version 0.1.0 kept. If it changed: has an option come, which `LATER` does not know?"""
    from dit_moe.evaluation.runs import decisive
    from dit_moe.experiments.image import load_experiment, open_data, resolve

    changes = ["data.size=32", "first_stage={name: autoencoder, model: digits}", "model.moe.implementation=grouped"]
    experiment = load_experiment("digits", changes)
    kept = decisive(resolve(experiment, open_data(experiment.data, "train")))
    content = json.dumps(kept, sort_keys=True, default=list).encode()
    assert hashlib.sha256(content).hexdigest() == "feb528283bfb1590edf7206256a98f94faebcae781e25e8a896e208c7a6259a1"


# -------------------------------------------------------------------------------------- files of statistics, and FID


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
