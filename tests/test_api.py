"""`dit_moe.load` and `dit_moe.train` give what the commands give, and refuse what they refuse."""

import json
import subprocess
import sys
from fnmatch import fnmatch

import huggingface_hub
import numpy as np
import pytest
import torch

import dit_moe
from dit_moe import downloads
from tests.cli.conftest import CONFIG, SMALL, cli, evaluate
from tests.folders import contents


@pytest.fixture(scope="module")
def model(finished_run) -> dit_moe.ImageModel:
    return dit_moe.load(finished_run)


def test_a_sample_is_to_the_byte_what_the_command_makes(model, finished_run, tmp_path):
    words = ["count=3", "seed=5", "guidance.scale=2", "sampler.steps=3", "labels=[7, 2]", "weights=model"]
    assert cli("sample", finished_run, *words, "--out", tmp_path) == 0
    saved = np.load(tmp_path / "images.npz")["arr_0"]
    asked = {"n": np.int64(3), "seed": 5, "guidance": np.float32(2), "steps": 3, "weights": "model"}
    images = model.sample(["7", np.int64(2)], **asked)
    assert [image.mode for image in images] == ["L"] * 3 and np.array_equal(np.stack(images)[..., None], saved)
    tensor = model.sample_tensor(torch.tensor([7, 2]), **asked)
    assert tensor.dtype == torch.uint8 and np.array_equal(tensor.permute(0, 2, 3, 1), saved)
    assert cli("sample", finished_run, "--out", tmp_path) == 0
    assert np.array_equal(np.stack(model.sample())[..., None], np.load(tmp_path / "images.npz")["arr_0"])


@pytest.mark.parametrize("place", ["folder", "hub", "cached"])
def test_a_pipeline_s_folder_or_repository_is_loaded_as_its_run(model, finished_run, place, tmp_path, monkeypatch):
    def snapshot(name, allow_patterns, local_files_only=False):
        assert name == "someone/digits" and not any(fnmatch("pipeline.py", each) for each in allow_patterns)
        if place == "cached" and not local_files_only:
            raise OSError("no network")
        return str(tmp_path / "out")

    assert cli("export", finished_run, tmp_path / "out", "--to", "diffusers") == 0
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(downloads, "require_reachable", lambda url: None)
    again = dit_moe.load(tmp_path / "out" if place == "folder" else "someone/digits")
    assert again.config.model == model.config.model and again.class_names == model.class_names
    assert np.array_equal(np.stack(again.sample("7", n=2)), np.stack(model.sample("7", n=2)))


def test_what_a_run_holds_is_there_typed(model, finished_run):
    assert model.step == 4 and model.config.train.batch_size == 8 and model.class_names == list("0123456789")
    assert not model.model.training and next(model.model.parameters()).dtype == torch.float32
    assert [line["step"] for line in model.log] == [1, 2, 3, 4] and len(model.log[0]["layers"]["active"]) == 2
    older = dit_moe.load(finished_run / "checkpoints" / "step_00000002")
    assert older.step == 2 and repr(older).endswith("step_00000002, step 2)")


def test_an_evaluation_reports_what_the_command_reports(model, finished_run, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as the kernels of notebooks do
    printed = evaluate(capsys, finished_run, "count=10", "sampler.steps=3", "--seeds", "1", "--metrics", "fd,kid")
    report = model.evaluate(n=10, steps=3, seeds=1, metrics=["fd", "kid"])
    found = json.loads(json.dumps(report.to_json()))
    assert found.pop("provenance")["samples"][0]["step"] == printed.pop("provenance")["samples"][0]["step"] == 4
    assert found == printed and report.flat()["fd_digits_cnn64.ratio"] > 0
    assert "held-out" in str(report) and "\x1b" not in str(report) + capsys.readouterr().err


def test_training_from_python_is_the_command_and_goes_on_where_it_stopped(finished_run, tmp_path):
    changes = dict(word.split("=", 1) for word in SMALL)
    changes = {key: json.loads(value) if value[0] in "0123456789n" else value for key, value in changes.items()}
    train = {"steps": 4}
    model = dit_moe.train("digits", changes | {"train.steps": 9}, run=tmp_path, train=train)
    assert model.step == 4 and model.run.sha256 == dit_moe.load(finished_run).run.sha256
    assert dit_moe.train(CONFIG, changes | {"train.steps": 5}, run=tmp_path).step == 5


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda model, _: model.sample("sveen"),
            r"sample.labels=sveen must lie in 0\.\.9, .* be the name",
        ),
        (lambda model, _: model.sample(1.5), r"sample.labels=1.5 must be a whole number, or a text"),
        (lambda model, _: model.sample(n=0), r"sample.count=0 must be at least 1"),
        (lambda model, _: model.sample(tempo=2), r"sample.tempo is not a known key"),
        (lambda model, place: model.evaluate(place / "nope"), r"nope"),
        (lambda model, _: model.evaluate(metrics=["fdd"]), r"fdd"),
        (lambda _, place: dit_moe.load(place), r"no checkpoint"),
        (lambda _, place: dit_moe.load(place / "no"), r"no does not exist"),
        (lambda _, place: dit_moe.load("someone/nothing"), r"someone/nothing cannot be had .* \(no network\); name a"),
        (
            lambda _, place: dit_moe.train("digitz", run=place / "x"),
            r"digitz does not exist; .*'digits'",
        ),
        (
            lambda _, place: dit_moe.train("digits", {"train.stepz": 1}, run=place / "x"),
            r"train.stepz is not a",
        ),
        (
            lambda _, place: dit_moe.train("digits", {"train..x": 1}, run=place / "x"),
            r"train..x=1 is not an",
        ),
        (lambda _, place: dit_moe.train({"model": "DiT-S/2"}), r"run is missing; name a folder"),
        (lambda _, place: dit_moe.train({"seed": 1}, run=place / "x"), r"model.name is missing"),
    ],
)
def test_bad_input_is_a_value_error_with_the_commands_words_and_leaves_nothing(
    model, call, message, tmp_path, monkeypatch
):
    before = contents(tmp_path)
    monkeypatch.setattr(downloads, "_unanswered", {})
    monkeypatch.setattr(downloads, "_problem_with", lambda url: "no network")
    with pytest.raises(ValueError, match=message):
        call(model, tmp_path)
    assert contents(tmp_path) == before


def test_a_language_model_writes_what_the_command_writes_and_is_scored(finished_text, tmp_path, capsys):
    run = finished_text / "run"
    words = ["--prompt", "The cat", "--prompt", "", "seed=3", "max_new_tokens=8", "target=3"]
    assert cli("sample", run, *words, "--out", tmp_path) == 0
    model = dit_moe.load(run)
    texts = model.sample(["The cat", ""], seed=3, max_new_tokens=8, target=3.0)
    assert texts == json.loads((tmp_path / "sample.json").read_text())["texts"]
    assert model.sample("The cat", seed=3, max_new_tokens=8) == model.sample(["The cat"], seed=3, max_new_tokens=8)
    metrics = json.loads((run / "metrics.json").read_text())
    assert model.evaluate()["bits_per_byte"] == metrics["bits_per_byte"]["model"]


def test_the_package_imports_nothing_heavy_until_it_is_asked_for():
    code = "import sys, dit_moe; assert not {'torch', 'numpy', 'yaml'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'sample'"):
        dit_moe.sample  # noqa: B018
