"""Weights of other suites in the place of a run, and a run's weights in their formats."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dit_moe
from dit_moe import checkpoint
from dit_moe.autoencoders.autoencoder import Autoencoder, AutoencoderConfig
from dit_moe.data import DATASETS
from dit_moe.formats import home_of, open_model
from dit_moe.models.base import Shape
from dit_moe.models.dit import SIZES
from tests.autoencoders.encoded import First, encode
from tests.autoencoders.small import make
from tests.cli.conftest import CONFIG, SMALL, cli
from tests.data.examples import class_files, write_tree
from tests.formats.files import BUNDLED, HEADS, of_training, weights_of
from tests.formats.peers import PEERS, random_state

NAMED = {"first_stage.model": "digits", "first_stage.shift": None, "first_stage.scale": None}  # as `BUNDLED`
QUICK = ("count=4", "sampler.steps=2", "labels=[0, 1]", *BUNDLED)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of DiT's training script, of a network whose size has a name, as then nothing need be told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "T", Shape(2, 48, 3, 192))
        yield of_training(tmp_path_factory.mktemp("weights") / "dit.pt", "dit")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Bare weights of DiT-MoE, of as many classes as there are digits: nothing need be told."""
    path = tmp_path_factory.mktemp("weights") / "experts.pt"
    torch.save(random_state(PEERS["DiT-MoE-XL"]._replace(classes=10)), path)
    return path


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Changes to a config: latents of digits, trained on and held out, and the autoencoder that comes along."""
    folder, stage = tmp_path_factory.mktemp("latents"), Autoencoder(AutoencoderConfig(model="digits"))
    images = DATASETS.config_class("digits")(size=32)
    for split in ("train", "heldout"):
        encode(folder / split, stage=stage, images=images, dataset=First(DATASETS.build(images, split), 16))
    return [f"data.path={folder / 'train'}", f"data.heldout={folder / 'heldout'}", *BUNDLED]


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    """The same as a run folder."""
    folder = tmp_path_factory.mktemp("runs") / "dit"
    assert cli("import", source, "--out", folder, *BUNDLED) == 0
    return folder


def test_weights_are_sampled_as_the_run_that_they_are_imported_into(source, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("sample", source, *QUICK) == 0
    assert "results  runs/dit/images.npz (" in capsys.readouterr().err
    assert cli("sample", run, "--out", tmp_path / "run", *QUICK) == 0
    images = [np.load(folder / "images.npz")["arr_0"] for folder in (Path("runs/dit"), tmp_path / "run")]
    assert np.array_equal(*images)
    facts = json.loads(Path("runs/dit/sample.json").read_text())
    assert facts["run"] == str(source) and facts["step"] == 0


def test_weights_share_no_folder_with_a_run_or_other_weights_of_their_name(source, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "runs/dit")
    before = sorted(Path("runs/dit").rglob("*"))
    assert cli("sample", source, *QUICK) == 0
    assert sorted(Path("runs/dit").rglob("*")) == before
    assert Path("runs/dit-weights/images.npz").is_file()
    assert open_model(source).run == tmp_path / "runs/dit-weights"  # whose autoencoder would be the weights' own, too
    images = Path("runs/dit-weights/images.npz").read_bytes()
    Path("other").mkdir()
    other = shutil.copy(source, "other/dit.pt")
    assert cli("sample", other, *QUICK, "seed=1") == 0
    assert Path("runs/dit-weights/images.npz").read_bytes() == images
    assert Path("runs/dit-weights-weights/images.npz").is_file()
    assert home_of(Path(other).absolute()) == Path("runs/dit-weights-weights")  # the same again


def test_weights_are_opened_from_python_with_an_autoencoder_of_the_user_s(source, run, tmp_path):
    asked = {"labels": [0, 1], "n": 4, "steps": 2}
    model, imported = dit_moe.load(source, NAMED | {"guidance.scale": 3}), dit_moe.load(run)
    assert torch.equal(model.sample_tensor(**asked), imported.sample_tensor(**asked, guidance=3))
    again = model.sample_tensor(**asked, weights="model", guidance=1.5)  # of which `run` has none
    assert not torch.equal(again, imported.sample_tensor(**asked))
    np.savez(tmp_path / "images.npz", arr_0=again.permute(0, 2, 3, 1).numpy())
    report = model.evaluate(tmp_path / "images.npz", **asked, seeds=1, extractor="digits_cnn")
    assert report.provenance.samples[0]["experiment"]["sample"]["guidance"]["scale"] == 3


def test_no_command_is_proposed_that_needs_data_which_an_import_does_not_name(run, tmp_path, capsys):
    assert cli("sample", run, "--out", tmp_path, "count=60", "sampler.steps=2", "guidance.scale=1") == 0
    assert "next" not in capsys.readouterr().err


@pytest.mark.parametrize("has_data", [False, True])
def test_the_routing_of_weights_is_counted_on_data_or_their_own_samples(
    experts, latents, tmp_path, capsys, monkeypatch, has_data
):
    monkeypatch.chdir(tmp_path)
    changes = latents if has_data else BUNDLED
    assert cli("routing", experts, *changes, "--images", 4, "--times", 2, "sampler.steps=1") == 0
    told = capsys.readouterr().err
    assert ("samples of the run itself" in told) == (not has_data)
    assert (f"next     dit-moe dial {experts} {latents[0]}" in told) == has_data
    assert Path("runs/experts/routing/report.html").is_file()


def test_weights_are_measured_at_several_compute_budgets(experts, latents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("dial", experts, *latents, "--no-metric", "--draws", 1, "--targets", "1,3") == 0
    (entry,) = json.loads(Path("runs/experts/dial/dial.json").read_text())["runs"]
    assert [point["active"] for point in entry["points"]] == [2, 1, 3]


def test_a_training_starts_from_weights_with_experts(experts, latents, tmp_path, capsys):
    data, autoencoder = latents[:2], BUNDLED[0]  # scaled as the weights mean it
    assert cli("import", experts, *data, autoencoder, "--out", tmp_path / "imported") == 0
    words = [f"train.init_from={experts}", "train.steps=1", "train.batch_size=4", "train.sample_every=null"]
    started = cli("train", tmp_path / "imported" / "config.yaml", "--run", tmp_path / "run", *words, "train.lr=1e-30")
    assert started == 0, capsys.readouterr().err
    before = checkpoint.open_checkpoint(tmp_path / "imported").weights("ema")
    after = checkpoint.open_checkpoint(tmp_path / "run").weights("model")
    assert all(torch.equal(before[key], after[key]) for key in before if not key.endswith("load_E"))


def test_weights_are_upcycled_on_data_and_with_an_autoencoder_of_the_user_s(source, latents, tmp_path, capsys):
    words = ["--name", "DiT-T/2-4E2A", "--router", "topk", "--out", tmp_path / "upcycled"]
    assert cli("upcycle", source, *words, *latents) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["output_difference"] <= 1e-5


def test_raw_weights_are_other_weights(source, tmp_path):
    for which in ("ema", "model"):
        assert cli("import", source, "--weights", which, "--out", tmp_path / which) == 0
    raw, averaged = (checkpoint.open_checkpoint(tmp_path / which).weights("ema") for which in ("model", "ema"))
    assert all(torch.equal(raw[name], 0.9 * averaged[name]) for name in averaged)


def test_weights_are_evaluated_exported_and_opened_from_python_without_an_import(source, tmp_path):
    assert cli("sample", source, "--out", tmp_path / "images", *QUICK) == 0
    reference = tmp_path / "images" / "images.npz"
    assert cli("eval", source, reference, "--extractor", "digits_cnn", "--seeds", "1", *QUICK) == 0
    make(tmp_path / "autoencoder")
    scaled = ["first_stage.shift=[0.25]", "first_stage.scale=[0.5]"]
    named = ["first_stage.kind=null", f"first_stage.model={tmp_path / 'autoencoder'}", *scaled]
    assert cli("export", source, tmp_path / "exported", *named) == 0
    assert dit_moe.load(tmp_path / "exported").config.first_stage.scale == (0.5,)
    assert cli("export", source, tmp_path / "bundled", *BUNDLED) == 0
    assert dit_moe.load(tmp_path / "bundled").config.first_stage.model == "digits"
    assert checkpoint.open_checkpoint(tmp_path / "exported").weights("ema").keys() == weights_of("dit").keys()
    assert len(dit_moe.load(tmp_path / "exported").sample(["1"], n=2, steps=2)) == 2


def test_a_training_starts_from_weights_as_from_a_run(source, tmp_path, capsys):
    size = "model={name: DiT-T/2, depth: null, width: null, heads: null, moe: null, mlp_hidden: null}"
    latents = ["objective=ddpm", "first_stage={name: autoencoder, model: digits, shift: [0], scale: [0.18215]}"]
    words = [*(word for word in SMALL if not word.startswith("model.")), "data.size=32", "sample.sampler=ddpm"]
    started = cli("train", CONFIG, "--run", tmp_path / "run", *words, size, *latents, f"train.init_from={source}")
    assert started == 0, capsys.readouterr().err
    assert "label table rebuilt: 7 of 10 classes kept by number, 3 new" in capsys.readouterr().err


def test_an_import_is_upcycled_and_trained_on_images_of_one_s_own_by_its_config(source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "photos", class_files(8))
    stage = [f"first_stage={{name: autoencoder, model: {make(tmp_path / 'autoencoder')}}}", "encode.workers=0"]
    images = "encode.images={name: image_folder, path: photos, size: 32, heldout: 0.25}"
    data = ["data.path=latents", "data.heldout=latents-heldout", images]
    short = ["train.steps=1", "train.batch_size=4", "train.warmup_steps=0", "sample.sampler.steps=2", "sample.count=2"]
    assert cli("import", source, "--out", "runs/dit", *stage, *data, *short) == 0
    assert cli("encode", "runs/dit/config.yaml") == 0
    assert cli("encode", "runs/dit/config.yaml", "--split", "heldout") == 0
    assert cli("upcycle", "runs/dit", "--name", "DiT-T/2-4E2A", "--out", "runs/upcycled") == 0
    assert cli("train", "runs/upcycled/config.yaml", "train.init_from=runs/upcycled", "--run", "runs/photos") == 0
    assert "dit-moe eval runs/photos" in capsys.readouterr().err
    assert cli("sample", "runs/photos", "labels=[ant, bee]") == 0


def test_a_compute_budget_that_weights_cannot_hold_is_not_dropped_from_an_export(experts, tmp_path, capsys):
    assert cli("export", experts, tmp_path / "out", "--to", "dit_moe", "target=1") == 2
    assert (
        "sample.target=1: weights of the format dit_moe hold the experts of training alone" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_a_run_exported_in_dit_s_format_is_the_state_dict_that_was_imported(run, tmp_path):
    assert cli("export", run, tmp_path / "dit", "--to", "dit") == 0
    written, original = load_file(tmp_path / "dit" / "model.safetensors"), weights_of("dit")
    assert written.keys() == original.keys() and all(torch.equal(written[key], original[key]) for key in original)
    assert cli("import", tmp_path / "dit", "--format", "dit", "--out", tmp_path / "again") == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [("sit", "objective.name=ddpm: weights of the format sit mean flow"), ("dit_moe", "does not fit that format")],
)
def test_a_model_that_a_suite_computes_otherwise_is_not_exported_in_its_format(run, tmp_path, capsys, name, said):
    assert cli("export", run, tmp_path / "other", "--to", name) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("option", "meant"),
    [("model.freq_shift=1", "0"), ("objective.prediction=v", "epsilon"), ("objective.timesteps=500", "1000")],
)
def test_a_run_with_options_that_a_suite_does_not_have_is_not_exported_as_if_it_had_none(
    source, tmp_path, capsys, option, meant
):
    assert cli("import", source, "--out", tmp_path / "run", option, HEADS) == 0
    assert cli("export", tmp_path / "run", tmp_path / "dit", "--to", "dit") == 2
    assert f"{option}: weights of the format dit mean {meant}" in capsys.readouterr().err
