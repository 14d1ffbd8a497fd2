"""A run folder is whole: moved alone, its data, latents and autoencoder deleted, it is used as before."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_moe.files import disk_used, sha256_of
from tests.autoencoders.small import make
from tests.cli.conftest import SMALL, cli, evaluate
from tests.cli.test_bad_input import refused
from tests.folders import contents
from tests.npz_files import write_images

CONFIG = str(Path(__file__).parents[2] / "configs" / "digits_latent.yaml")
RELATIVE = [
    *SMALL,
    "data.path=latents",
    "first_stage.model=autoencoder",
    "encode.images={name: image_folder, path: images, size: 16}",
]
WEIGHTS = "diffusion_pytorch_model.safetensors"  # of the autoencoder
JUDGED = ["count=20", "--seeds=1", "--metrics=fd", "--channels=1", "--size=8", "--extractor=digits_cnn64"]


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> Path:
    """A run on latents by relative paths, moved away from everything that it was trained with, which is deleted."""
    start, here = tmp_path_factory.mktemp("start"), Path.cwd()
    chance = np.random.default_rng(0)
    for label in ("cats", "dogs"):
        (start / "images" / label).mkdir(parents=True)
        for i in range(6):
            pixels = chance.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(start / "images" / label / f"{i}.png")
    make(start / "autoencoder")
    os.chdir(start)
    try:
        assert cli("encode", CONFIG, *RELATIVE) == 0
        (start / "elsewhere").mkdir()
        os.chdir(start / "elsewhere")  # from where the latents know their autoencoder
        assert cli("train", CONFIG, *RELATIVE, "first_stage=null", "data.path=../latents", "--run", "../run") == 0
    finally:
        os.chdir(here)
    (start / "run").rename(target := tmp_path_factory.mktemp("moved") / "run")
    shutil.rmtree(start)
    return target


@pytest.fixture
def moved_text(finished_text, tmp_path) -> Iterator[Path]:
    """A language model's run, whose tokens are hidden."""
    tokens, hidden = finished_text / "tokens", finished_text / "hidden"
    tokens.rename(hidden)
    yield Path(shutil.copytree(finished_text / "run", tmp_path / "text"))
    hidden.rename(tokens)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """Images to compare with: images.npz, and the folder png."""
    folder = tmp_path_factory.mktemp("reference")
    chance = np.random.default_rng(1)
    images = chance.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    write_images(folder / "images.npz", images, np.zeros(20, dtype=np.int64))
    (folder / "png").mkdir()
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / "png" / f"{i}.png")
    return folder


def test_it_is_sampled_with_the_copy_of_its_autoencoder_and_its_class_names(moved, tmp_path):
    assert {path.name for path in (moved / "autoencoder").iterdir()} > {"config.json"}
    assert cli("sample", moved, "count=4", "labels=[dogs]", "--out", tmp_path / "out") == 0
    with np.load(tmp_path / "out" / "images.npz") as arrays:
        assert arrays["arr_0"].shape == (4, 16, 16, 3) and set(arrays["labels"]) == {1}


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_it_is_evaluated_against_the_images_that_are_named(moved, reference, kind, capsys):
    named = reference / "images.npz" if kind == "npz" else reference / "png"
    assert evaluate(capsys, moved, named, *JUDGED)["fd_digits_cnn64"]["n"] == 20


def test_an_evaluation_without_its_images_says_which_option_names_them(moved, capsys):
    told = "encode.images.path=FOLDER, or name a REFERENCE behind the run"
    refused(capsys, 2, told, "eval", moved, *JUDGED)


def test_training_goes_on_where_the_latents_are_named_and_says_so_where_they_are_missing(moved, capsys):
    before = contents(moved)
    refused(capsys, 2, "or name another folder in data.path", "train", moved / "config.yaml", "--run", moved)
    assert contents(moved) == before


@pytest.mark.parametrize("kind", ["images", "text"])
def test_its_routing_is_shown_on_samples_of_its_own_and_the_report_says_so(kind, request, tmp_path, monkeypatch):
    monkeypatch.setattr("dit_moe.analysis.page.figures_of", lambda stats: [])
    run = request.getfixturevalue("moved" if kind == "images" else "moved_text")
    size = ["--images", 6, "--times", 2] if kind == "images" else []
    assert cli("routing", run, *size, "--out", tmp_path / "out") == 0
    facts = json.loads((tmp_path / "out" / "routing.json").read_text())["facts"]
    assert facts["split"] in (page := (tmp_path / "out" / "report.html").read_text()) and "of the run itself" in page
    assert facts["images" if kind == "images" else "documents"] == (6 if kind == "images" else 16)


def test_its_routing_on_data_that_are_named_needs_them(moved, capsys):
    refused(capsys, 2, "nowhere holds no encoded latents", "routing", moved, "data.path=nowhere", "--split", "train")


def test_a_language_model_is_exported_and_writes_text(moved_text, tmp_path):
    assert cli("sample", moved_text, "--out", tmp_path / "samples") == 0
    assert cli("export", moved_text, tmp_path / "exported") == 0


def test_it_is_exported_as_a_run_without_its_training_state_that_makes_the_same_images(moved, tmp_path, capsys):
    exported = tmp_path / "exported"
    assert cli("export", moved, exported, "count=4", "seed=1") == 0
    facts = json.loads(capsys.readouterr().out)
    assert {path.name for path in exported.rglob("*.safetensors")} == {"ema.safetensors", WEIGHTS}
    assert facts["bytes"] == disk_used(exported) < disk_used(moved) / 2
    assert facts["weights_sha256"] == sha256_of(next(moved.glob("checkpoints/step_00000004/ema.safetensors")))
    assert cli("sample", moved, "count=4", "seed=1", "--out", tmp_path / "one") == 0
    assert cli("sample", exported, "--out", tmp_path / "other") == 0
    one, other = (np.load(tmp_path / name / "images.npz")["arr_0"] for name in ("one", "other"))
    assert np.array_equal(one, other)
    refused(capsys, 2, "was exported without model.safetensors", "sample", exported, "weights=model")
    refused(capsys, 2, "holds autoencoder", "export", moved, exported)
    refused(capsys, 2, "--olmoe: ", "export", moved, tmp_path / "no", "--olmoe")
