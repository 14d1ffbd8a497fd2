"""The recipe `own_images`: what follows from a folder of images, and the quick start that it makes possible."""

import json
import re
import shlex
import subprocess
from dataclasses import replace

import pytest

from dit_moe.config import ConfigError
from dit_moe.evaluation import own_extractor
from dit_moe.evaluation.runs import training_images
from dit_moe.experiments import own_images
from dit_moe.experiments.image import load_experiment
from dit_moe.extractors import trained_cnn
from dit_moe.tasks.train import resolve_for_dry_run, run_folder
from tests.cli.conftest import cli
from tests.data.examples import CLASSES, encoded, pixels, write_tree
from tests.shown import ROOT


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(own_images, "_hardware", lambda: own_images.ON_CPU)


def folder_of(place, height, width, each=20):
    names = [f"{name}/{i}.png" for name in CLASSES for i in range(each)]
    return write_tree(place, {name: encoded(pixels(i, height, width)) for i, name in enumerate(names)})


@pytest.mark.parametrize(
    ("height", "width", "size", "patch"),
    [(8, 8, 8, 1), (16, 16, 16, 2), (30, 41, 28, 4), (64, 64, 64, 8)],
)
def test_up_to_64_pixels_are_trained_on_as_they_are_at_a_multiple_of_the_patch(tmp_path, height, width, size, patch):
    found = load_experiment(folder_of(tmp_path / "images", height, width, each=2))
    assert found.data.size == size and found.model.name == f"DiT-custom/{patch}-8E2A"
    assert found.model.moe.router.__class__.__name__ == "DTopPConfig"
    assert (found.data.heldout, found.data.reserve, found.train.batch_size) == (0.2, 0.2, 2)


def test_larger_images_are_encoded_by_a_given_autoencoder_or_one_that_is_trained_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(own_extractor, "missing_weights", lambda: "no network")
    images = folder_of(tmp_path / "images", 90, 150, each=10)
    own, given = load_experiment(images), load_experiment(images, ["first_stage.model=other/vae"])
    assert own.first_stage.model == "runs/images/autoencoder" and own.first_stage_training is not None
    assert resolve_for_dry_run(own).model.footprint().total_params > 0  # before there is any autoencoder
    said = "in the features of inception, if its weights can be downloaded, otherwise trained_cnn"
    assert said in capsys.readouterr().err
    assert given.first_stage.model == "other/vae" and given.first_stage_training is None
    for found in (own, given):
        assert found.data.path == "runs/images/latents" and found.encode.images.path == str(images)
        assert found.encode.images.size == 64 and found.encode.images.heldout == 0.2


def test_an_evaluation_says_that_the_folder_holds_other_images_than_the_run_was_trained_on(tmp_path, capsys):
    found = load_experiment(folder_of(tmp_path / "images", 16, 16))
    training_images(found)
    assert "other images" not in capsys.readouterr().err
    training_images(replace(found, data=replace(found.data, fingerprint="0" * 64)))
    assert "holds other images than the run was trained on" in " ".join(capsys.readouterr().err.split())


def test_what_the_user_writes_wins_and_nothing_of_the_recipe_is_left_in_the_config(tmp_path):
    images = folder_of(tmp_path / "images", 16, 16, each=2)
    tree = own_images.load(images, ["train.steps=70", "data.heldout=0.3", "data.size=8", "model.moe.router=topk"])
    assert "recipe" not in tree and tree["train"]["steps"] == 70 and tree["train"]["warmup_steps"] == 7
    assert tree["data"] == {"name": "image_folder", "path": str(images), "heldout": 0.3, "reserve": 0.2, "size": 8}
    assert tree["model"]["moe"] == {"router": "topk"} and tree["model"]["name"] == "DiT-custom/1-8E2A"


def test_a_folder_of_splits_is_trained_on_its_own_splits_and_a_run_is_called_as_its_folder(tmp_path):
    for split in ("train", "val"):
        folder_of(tmp_path / "my images" / split, 16, 16, each=2)
    data = load_experiment(tmp_path / "my images").data
    assert data.path.endswith("/train") and data.heldout.endswith("/val") and data.reserve == 0.2
    assert run_folder(tmp_path / "my images").as_posix() == "runs/my images"
    assert run_folder("my_images", None, [f"data.path={tmp_path}/my images/train"]).as_posix() == "runs/my images"


def test_make_passes_variables_with_a_dot_on_as_changes_and_no_others():
    words = ["make", "-n", "quickstart", "CONFIG=my_images", "VENV=v", "data.path=my 'own' images", "train.steps=5"]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command = shlex.split(shown.splitlines()[-1])
    assert command[:3] == ["v/bin/dit-moe", "quickstart", "my_images"]
    assert sorted(command[3:]) == ["data.path=my 'own' images", "train.steps=5"]


def test_make_alone_lists_every_target_that_is_for_users_and_runs_none():
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert set(re.findall(r"^make ([\w-]+)", shown, re.MULTILINE)) == set(targets) - {"check"}
    setup = subprocess.run(["make", "-n", "setup"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "requirements/install.py" in setup and "quickstart" not in setup


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], r"data.path is missing; name the folder of your images: dit-moe quickstart FOLDER"),
        (["data.path=nowhere"], r"data.path=nowhere does not exist"),
        (["recipe=other"], r"recipe=other is not known; there is own_images"),
        (["data=digits", "data.path=x"], r"data.path is not a known key"),
    ],
)
def test_a_config_without_images_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_experiment("my_images", changes)


SMALL = ["model.width=32", "model.depth=1", "model.heads=2", "train.steps=2", "sample.sampler.steps=1", "eval.images=4"]
FIRST = ["first_stage_training.train.steps=1", "first_stage_training.autoencoder.block_out_channels=[8, 8, 8]"]


@pytest.mark.parametrize(
    ("side", "changes"),
    [(16, []), (70, FIRST)],
    ids=["pixels", "latents"],
)
def test_the_quick_start_of_a_folder_leaves_everything_in_its_run(side, changes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trained_cnn, "FEWEST_STEPS", 2)
    monkeypatch.setattr(own_extractor, "missing_weights", lambda: "no network")
    folder_of(tmp_path / "my images", side, side)
    (tmp_path / "my images" / CLASSES[0] / "broken.jpg").write_bytes(b"no image")
    run = tmp_path / "runs" / "my images"
    assert cli("quickstart", "my images", *SMALL, *changes) == 2  # before a network is trained
    assert "broken.jpg is not an image" in " ".join(capsys.readouterr().err.split())
    assert not (run / "extractor").exists()
    for _ in range(2):  # the second time it has nothing to train
        assert cli("quickstart", "my images", *SMALL, *changes, "--skip-broken") == 0, capsys.readouterr().err
    metrics, facts = (json.loads((run / name).read_text()) for name in ("metrics.json", "extractor/extractor.json"))
    space = f"trained_cnn64_{facts['weights_sha256'][:8]}"
    assert metrics[f"fd_{space}"]["floor"] > 0 and 0 <= metrics["class_accuracy"] <= 1
    assert metrics[f"fd_{space}"]["noise"] > 0 and "is nothing learned" in " ".join(capsys.readouterr().err.split())
    assert metrics["provenance"]["extractor"]["name"] == space and facts["class_names"] == list(CLASSES)
    assert {"grid.png", "curves.png", "images.npz", "sample.json", "config.yaml"} <= {
        each.name for each in run.iterdir()
    }
    assert (run / "autoencoder").is_dir() == (side > 64)
