"""The way of ImageNet on the command line: encode, verify, train, sample, evaluate."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_moe.training.log import read_log
from tests.autoencoders.small import make
from tests.cli.conftest import SMALL, cli
from tests.cli.test_bad_input import refused
from tests.folders import contents

CONFIG = str(Path(__file__).parents[2] / "configs" / "digits_latent.yaml")
SMALLER = [*SMALL, "model.name=DiT-custom/4-4E2A", "encode.shard_size=300"]


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "latents"
    assert cli("encode", CONFIG, f"data.path={folder}", *SMALLER) == 0
    return folder


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory, latents):
    folder = tmp_path_factory.mktemp("runs") / "latent"
    assert cli("train", CONFIG, f"data.path={latents}", *SMALLER, "--run", folder) == 0
    return folder


@pytest.fixture
def images(tmp_path):
    """An image folder of 2 classes with 6 colourful images each."""
    chance = np.random.default_rng(0)
    for label in ("cats", "dogs"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(6):
            pixels = chance.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.jpg")
    return tmp_path / "images"


def of_images(tmp_path, images, **more):
    """The overrides for `images`, 16 pixels wide, with an autoencoder made on the spot."""
    model = tmp_path / "autoencoder"
    if not model.exists():
        make(model)
    settings = {
        "data.path": tmp_path / "latents",
        "first_stage.model": model,
        "encode.images": f"{{name: image_folder, path: {images}, size: 16}}",
        "encode.flips": "true",
        "encode.batch_size": 4,
        "encode.shard_size": 5,
    } | more
    return [f"{key}={value}" for key, value in settings.items()]


def test_encoding_says_what_it_made_and_verifying_draws_it(capsys, latents):
    assert cli("encode", CONFIG, f"data.path={latents}", *SMALLER) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["images"], facts["shards"], facts["shards_made"]) == (898, 3, 0)
    assert cli("encode", CONFIG, f"data.path={latents}", *SMALLER, "--verify") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["verified"] and facts["mean_absolute_error"] < 6
    assert Image.open(latents / "verify.png").size[0] > 8 * 32


def test_verifying_is_refused_for_other_images_or_another_way(capsys, tmp_path, latents):
    words = ["encode", CONFIG, f"data.path={latents}", *SMALLER, "--verify"]
    refused(capsys, 2, "encode.flips=True differs from the encoding in", *words, "encode.flips=true")
    refused(capsys, 2, "encode.images.size=64 differs from", *words, "encode.images.size=64")
    model = make(tmp_path / "other", in_channels=1, out_channels=1)
    refused(capsys, 2, "encode.first_stage.sha256=", *words, f"first_stage.model={model}")


def test_a_run_on_latents_is_sampled_as_images(latent_run, tmp_path):
    assert cli("sample", latent_run, "count=12", "first_stage.slicing=true", "--out", tmp_path) == 0
    with np.load(tmp_path / "images.npz") as arrays:
        assert arrays["arr_0"].shape == (12, 32, 32, 1)


def test_quickstart_goes_the_whole_way_and_shows_the_reconstruction(tmp_path, latents):
    words = ["quickstart", CONFIG, f"data.path={latents}", *SMALLER, "eval.seeds=1", "--run", tmp_path / "run"]
    assert cli(*words) == 0
    distance = json.loads((tmp_path / "run" / "metrics.json").read_text())["fd_digits_cnn64"]
    assert 0.8 < distance["reconstruction_ratio"] < 1.5 < distance["ratio"]


def test_quickstart_compares_its_config_with_the_latents_before_it_trains(capsys, tmp_path, latents):
    words = ["quickstart", CONFIG, f"data.path={latents}", *SMALLER, "--run", tmp_path / "run"]
    refused(capsys, 2, "encode.flips=True differs from the encoding in", *words, "encode.flips=true")
    refused(capsys, 2, "encode is missing; results are compared with the images", *words, "encode=null")
    assert not (tmp_path / "run").exists()


def test_quickstart_needs_no_encoding_of_images_encoded_on_the_fly(tmp_path):
    on_the_fly = ["data={name: digits, size: 32}", "encode.images.size=8", "eval.seeds=1"]  # not the images trained on
    assert cli("quickstart", CONFIG, *SMALL, *on_the_fly, "--run", tmp_path / "run") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["fd_digits_cnn64"]["reconstruction_ratio"] < 1.5


def test_quickstart_says_before_training_that_the_images_cannot_be_judged(capsys, tmp_path, images):
    words = ["quickstart", CONFIG, *of_images(tmp_path, images), *SMALL, "--run", tmp_path / "run"]
    refused(capsys, 2, "no held-out images to say how many to sample; set eval.images", *words, "eval.images=null")
    for label in ("cats", "dogs"):
        (tmp_path / "others" / label).mkdir(parents=True)
        Image.new("RGB", (20, 20), "red").save(tmp_path / "others" / label / "0.png")
    heldout = f"encode.images.heldout={tmp_path / 'others'}"
    words += [heldout, "eval.extractor=digits_cnn64"]
    refused(capsys, 2, "digits_cnn64 takes digits: square images of 1 channel", *words)
    assert not (tmp_path / "run").exists()


def test_image_folders_are_encoded_trained_on_and_sampled_and_encoding_on_the_fly_trains_the_same(tmp_path, images):
    settings = of_images(tmp_path, images, **{"encode.dtype": "fp32"})
    assert cli("encode", CONFIG, *settings) == 0
    assert cli("train", CONFIG, *settings, *SMALL, "--run", tmp_path / "shards") == 0
    on_the_fly = f"data={{name: image_folder, path: {images}, size: 16, flip: true}}"
    assert cli("train", CONFIG, *settings, *SMALL, on_the_fly, "--run", tmp_path / "flying") == 0
    assert cli("sample", tmp_path / "shards", "count=4") == 0
    with np.load(tmp_path / "shards" / "images.npz") as arrays:
        assert arrays["arr_0"].shape == (4, 16, 16, 3)
    shards, flying = ([line["loss"] for line in read_log(tmp_path / run / "log.jsonl")] for run in ("shards", "flying"))
    assert shards == pytest.approx(flying, rel=1e-5)  # fp32 rounding of other batches in the autoencoder


def test_held_out_images_and_folders_that_are_trained_on_are_refused_before_anything_is_encoded(
    capsys, tmp_path, images
):
    settings = of_images(tmp_path, images)
    words = ["encode", CONFIG, *settings, f"data.heldout={tmp_path / 'x' / '..' / 'latents'}"]
    refused(capsys, 2, "is data.path, the folder of the latents that are trained on", *words)
    words = ["encode", CONFIG, *settings, f"encode.images.heldout={images}"]
    refused(capsys, 2, "encode.images.heldout has ", *words)
    assert not (tmp_path / "latents").exists()


def test_broken_files_stop_it_at_the_end_unless_they_are_to_be_skipped(capsys, tmp_path, images):
    (images / "cats" / "note.jpg").write_text("not an image")
    (images / "cats" / "note.txt").write_text("passed over")
    settings = of_images(tmp_path, images)
    refused(capsys, 1, "note.jpg", "encode", CONFIG, *settings)
    assert not (tmp_path / "latents" / "manifest.json").exists()
    refused(capsys, 2, "holds an unfinished encoding", "train", CONFIG, *settings, *SMALL, "--run", tmp_path / "run")
    capsys.readouterr()
    assert cli("encode", CONFIG, *settings, "--skip-broken") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["images"], facts["skipped"]) == (12, 1)
    manifest = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    assert manifest["passed_over"] == {"files of other kinds": {"count": 1, "first": "cats/note.txt"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("encode=null", "encode is missing; say which images to encode"),
        ("data={name: digits, size: 32}", "data.name=digits takes no encoded latents"),
        ("first_stage=identity", "first_stage names no autoencoder"),
        ("first_stage.model=.", "has no readable config.json"),
        ("encode.shard_size=0", "encode.shard_size=0 must be at least 1"),
    ],
)
def test_a_mistake_in_the_config_is_refused_before_anything_is_encoded(capsys, tmp_path, change, message):
    folder = tmp_path / "latents"
    refused(capsys, 2, message, "encode", CONFIG, f"data.path={folder}", change)
    assert not folder.exists()


def test_a_run_refuses_latents_of_another_space_with_both_descriptions(capsys, tmp_path, latent_run):
    run = shutil.copytree(latent_run, tmp_path / "run")
    before = contents(run)
    model = make(tmp_path / "other", in_channels=1, out_channels=1)
    settings = [f"data.path={tmp_path / 'others'}", f"first_stage.model={model}", *SMALLER, "encode.images.size=16"]
    assert cli("encode", CONFIG, *settings) == 0
    refused(capsys, 2, "first_stage is of the latent space", "train", CONFIG, *settings, "train.steps=6", "--run", run)
    assert contents(run) == before
    refused(
        capsys, 2, "these latents are of an AutoencoderKL with weights", "sample", run, f"first_stage.model={model}"
    )
    assert contents(run) == before


def test_a_run_refuses_other_latents_of_the_same_space(capsys, tmp_path, latents, latent_run):
    run = shutil.copytree(latent_run, tmp_path / "run")
    settings = [*SMALLER, "encode.dtype=fp16", f"data.path={tmp_path / 'others'}"]
    assert cli("encode", CONFIG, *settings) == 0
    refused(capsys, 2, "data.fingerprint=", "train", CONFIG, *settings, "train.steps=6", "--run", run)
    moved = shutil.copytree(latents, tmp_path / "moved")
    assert cli("train", CONFIG, *SMALLER, f"data.path={moved}", "train.steps=6", "--run", run) == 0
