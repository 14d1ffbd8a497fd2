"""Bad input: one clear message, exit code 2 before the work starts (1 in its middle), and nothing overwritten."""

import hashlib
import json

import numpy as np
import pytest

from dit_moe.data import digits
from tests.cli.conftest import CONFIG, SMALL, cli
from tests.folders import contents


def refused(capsys, code: int, message: str, *words: object) -> None:
    capsys.readouterr()
    assert cli(*words) == code
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    told = [line for line in err.splitlines() if line.startswith(("error:", "failed:"))]
    assert len(told) == 1, err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "train.lrr is not a known key; did you mean 'lr'?"),
        ("model.num_classes=7", "model.num_classes=7 contradicts the data, which has 10"),
    ],
)
def test_a_mistake_in_the_config_is_refused_before_a_folder_is_made(capsys, tmp_path, override, message):
    folder = tmp_path / "run"
    refused(capsys, 2, message, "train", CONFIG, "--run", folder, *SMALL, override)
    assert not folder.exists()


def test_a_missing_config_file_is_named(capsys, tmp_path):
    refused(capsys, 2, "nowhere.yaml does not exist", "train", tmp_path / "nowhere.yaml")


def test_nan_in_the_data_is_found_before_training(capsys, tmp_path, monkeypatch):
    raw = digits.load_digits()
    raw.images = raw.images.astype(np.float64).copy()
    raw.images[11, 3, 4] = np.nan
    monkeypatch.setattr(digits, "load_digits", lambda: raw)
    folder = tmp_path / "run"
    refused(capsys, 2, "image 11 of the digits has the pixel nan", "train", CONFIG, "--run", folder, *SMALL)
    assert not folder.exists()


@pytest.mark.parametrize("command", ["train", "sample"])
def test_a_truncated_checkpoint_is_refused_and_nothing_is_written(capsys, a_run, command):
    weights = sorted(a_run.glob("checkpoints/*"))[-1] / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    before = contents(a_run)
    words = {"train": [CONFIG, "--run", a_run, *SMALL, "train.steps=6"], "sample": [a_run]}[command]
    refused(capsys, 2, "ema.safetensors has", command, *words)
    assert contents(a_run) == before


def test_weights_of_another_architecture_are_refused(capsys, a_run):
    folder = sorted(a_run.glob("checkpoints/*"))[-1]
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("depth: 2", "depth: 3"))
    refused(capsys, 2, "config.yaml was changed after it was written", "sample", a_run)
    state = folder / "state.json"
    facts = json.loads(state.read_text())
    facts["files"]["config.yaml"]["sha256"] = hashlib.sha256(config.read_bytes()).hexdigest()
    state.write_text(json.dumps(facts))
    refused(capsys, 2, "holds another architecture", "sample", a_run)


@pytest.mark.parametrize("command", ["train", "sample"])
def test_a_folder_that_cannot_be_written_is_named(capsys, finished_run, tmp_path, command):
    blocker = tmp_path / "file"
    blocker.write_text("in the way")  # works for root too, whom permissions do not stop
    target = blocker / "run"
    words = {"train": [CONFIG, "--run", target, *SMALL], "sample": [finished_run, "--out", target]}[command]
    refused(capsys, 2, "cannot be written", command, *words)
    assert blocker.read_text() == "in the way"


def test_sampling_nothing_or_an_unknown_class_is_refused(capsys, a_run):
    before = contents(a_run)
    refused(capsys, 2, "sample.count=0 must be at least 1", "sample", a_run, "count=0")
    refused(capsys, 2, "sample.labels=[12] must lie in 0..9", "sample", a_run, "labels=[12]")
    refused(capsys, 2, "sample.sampler.name=ddim", "sample", a_run, "sampler=ddim")
    refused(capsys, 2, "holds no checkpoint", "sample", a_run.parent)
    assert contents(a_run) == before


def test_labels_from_data_that_a_run_did_not_record_are_refused(capsys, a_run):
    path = a_run / "checkpoints" / "step_00000004" / "state.json"
    facts = json.loads(path.read_text())
    del facts["class_counts"]
    path.write_text(json.dumps(facts))
    before = contents(a_run)
    refused(capsys, 2, "sample.labels=data needs the class frequencies", "sample", a_run, "labels=data")
    assert contents(a_run) == before


def test_a_run_that_diverges_stops_with_code_1(capsys, tmp_path):
    words = ["train", CONFIG, "--run", tmp_path, *SMALL, "train.lr=1e38", "train.grad_clip=null", "train.steps=50"]
    refused(capsys, 1, "before the update; the weights were not touched", *words)


def test_unknown_options_and_commands_are_argparse_errors(capsys):
    assert cli("train", CONFIG, "--rum", "x") == 2
    assert cli("fly") == 2
    assert "Traceback" not in capsys.readouterr().err
