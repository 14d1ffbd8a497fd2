"""Weights of other suites in the place of a run, and a run's weights in their formats."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dit_moe
from dit_moe import checkpoint
from dit_moe.models.base import Shape
from dit_moe.models.dit import SIZES
from tests.autoencoders.small import make
from tests.cli.conftest import CONFIG, SMALL, cli
from tests.formats.files import BUNDLED, HEADS, of_training, weights_of

QUICK = ("count=4", "sampler.steps=2", "labels=[0, 1]", *BUNDLED)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of DiT's training script, of a network whose size has a name, as then nothing need be told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "T", Shape(2, 48, 3, 192))
        yield of_training(tmp_path_factory.mktemp("weights") / "dit.pt", "dit")


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    """The same as a run folder."""
    folder = tmp_path_factory.mktemp("runs") / "dit"
    assert cli("import", source, "--out", folder, *BUNDLED) == 0
    return folder


def test_weights_are_sampled_as_the_run_that_they_are_imported_into(source, run, tmp_path):
    for name, given in {"file": source, "run": run}.items():
        assert cli("sample", given, "--out", tmp_path / name, *QUICK) == 0
    images = [np.load(tmp_path / name / "images.npz")["arr_0"] for name in ("file", "run")]
    assert np.array_equal(*images)
    facts = json.loads((tmp_path / "file" / "sample.json").read_text())
    assert facts["run"] == str(source) and facts["step"] == 0


def test_raw_weights_are_other_weights(source, tmp_path):
    for which in ("ema", "model"):
        assert cli("import", source, "--weights", which, "--out", tmp_path / which) == 0
    raw, averaged = (checkpoint.open_checkpoint(tmp_path / which).weights("ema") for which in ("model", "ema"))
    assert all(torch.equal(raw[name], averaged[name] + 1) for name in averaged)


def test_weights_are_evaluated_exported_and_opened_from_python_without_an_import(source, tmp_path):
    assert cli("sample", source, "--out", tmp_path / "images", *QUICK) == 0
    reference = tmp_path / "images" / "images.npz"
    assert cli("eval", source, reference, "--extractor", "digits_cnn", "--seeds", "1", *QUICK) == 0
    make(tmp_path / "autoencoder")
    named = ["first_stage.kind=null", f"first_stage.model={tmp_path / 'autoencoder'}"]
    assert cli("export", source, tmp_path / "exported", *named) == 0
    assert checkpoint.open_checkpoint(tmp_path / "exported").weights("ema").keys() == weights_of("dit").keys()
    assert len(dit_moe.load(tmp_path / "exported").sample(["1"], n=2, steps=2)) == 2


def test_a_training_starts_from_weights_as_from_a_run(source, tmp_path, capsys):
    size = "model={name: DiT-T/2, depth: null, width: null, heads: null, moe: null, mlp_hidden: null}"
    latents = ["objective=ddpm", "first_stage={name: autoencoder, model: digits, shift: [0], scale: [0.18215]}"]
    words = [*(word for word in SMALL if not word.startswith("model.")), "data.size=32", "sample.sampler=ddpm"]
    started = cli("train", CONFIG, "--run", tmp_path / "run", *words, size, *latents, f"train.init_from={source}")
    assert started == 0, capsys.readouterr().err
    assert "label table rebuilt: 7 of 10 classes kept by name, 3 new" in capsys.readouterr().err


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


def test_an_import_with_options_of_its_own_model_is_not_exported_as_if_it_had_none(source, tmp_path, capsys):
    assert cli("import", source, "--out", tmp_path / "run", "model.freq_shift=1", HEADS) == 0
    assert cli("export", tmp_path / "run", tmp_path / "dit", "--to", "dit") == 2
    assert "model.freq_shift=1: weights of the format dit mean 0" in capsys.readouterr().err
