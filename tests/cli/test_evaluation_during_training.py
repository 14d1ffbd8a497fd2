"""Evaluation of a few samples during training."""

import json

import pytest

from dit_moe.diffusion import SamplingError
from dit_moe.evaluation.comparison import Comparison

from .conftest import CONFIG, SMALL, cli

LIGHT = [*SMALL, "eval.light_every=2", "eval.light_images=20"]


def lines(folder):
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    assert cli("train", CONFIG, "--run", folder, *LIGHT) == 0
    return folder


def test_evaluation_during_training_changes_nothing_that_is_learned(evaluated_run, finished_run):
    for name in ("model", "ema"):
        weights = f"checkpoints/step_00000004/{name}.safetensors"
        assert (evaluated_run / weights).read_bytes() == (finished_run / weights).read_bytes()


def test_every_so_many_steps_a_distance_is_logged_whose_name_says_of_how_few_images_it_is(evaluated_run, capsys):
    found = lines(evaluated_run)
    assert [line["step"] for line in found] == [2, 4]
    name = "fd_digits_cnn64_n20"
    floors = {f"{name}_floor", f"{name}_floor_estimate"}
    assert set(found[0]) == {"step", name, *floors, "sampled_active_experts"}
    assert all(line[name] > line[f"{name}_floor"] > 0 for line in found)
    capsys.readouterr()
    words = ["count=20", "--seeds", "1", "--metrics", "fd"]
    assert cli("eval", evaluated_run, *words) == 0
    same = json.loads(capsys.readouterr().out)
    assert found[-1][name] == pytest.approx(same["fd_digits_cnn64"]["generated"], rel=1e-6)  # the run's last weights
    assert found[-1][f"{name}_floor"] == pytest.approx(same["fd_digits_cnn64"]["floor"])
    sampled = same["provenance"]["samples"][0]["active_experts"]
    assert found[-1]["sampled_active_experts"] == pytest.approx(sampled)


def test_latents_are_evaluated_by_the_images_that_were_encoded(tmp_path):
    config = str(CONFIG).replace("digits.yaml", "digits_latent.yaml")
    options = [*LIGHT, f"data.path={tmp_path / 'latents'}", "train.steps=2"]
    assert cli("encode", config, f"data.path={tmp_path / 'latents'}") == 0
    assert cli("train", config, "--run", tmp_path / "run", *options) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("eval.extractor={name: inception, weights: gone.pth}", "gone.pth"),
        ("eval.reference='{name: digits, size: 16}'", "the run's images has images of 1×8×8"),
    ],
)
def test_what_could_not_be_evaluated_is_refused_before_training(tmp_path, capsys, change, message):
    assert cli("train", CONFIG, "--run", tmp_path / "run", *LIGHT, change) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run" / "checkpoints").exists()


def test_an_evaluation_that_fails_is_a_warning_and_training_goes_on(tmp_path, capsys, monkeypatch):
    def fail(self, samples):
        raise SamplingError("latents are not finite")

    monkeypatch.setattr(Comparison, "evaluate", fail)
    assert cli("train", CONFIG, "--run", tmp_path / "run", *LIGHT) == 0
    assert capsys.readouterr().err.count("warning: no evaluation at step") == 2
    assert cli("train", CONFIG, "--run", tmp_path / "run", *LIGHT, "train.steps=6") == 0
