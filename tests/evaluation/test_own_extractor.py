"""Which feature space a run is evaluated in where its config leaves that open."""

import json

import pytest

from dit_moe import config
from dit_moe.api import train
from dit_moe.config import ConfigError
from dit_moe.evaluation import own_extractor
from dit_moe.evaluation.evaluate import evaluate
from dit_moe.evaluation.options import EvalOptions
from dit_moe.evaluation.own_extractor import chosen_config, describe_choice, extractor_of
from dit_moe.experiments.image import image_experiment
from dit_moe.extractors import trained_cnn
from dit_moe.extractors.digits_cnn import DigitsCNNConfig
from dit_moe.extractors.inception import InceptionConfig
from dit_moe.extractors.trained_cnn import TrainedCNNConfig
from tests.data.examples import class_files, write_tree


@pytest.fixture
def weights(monkeypatch):
    """Sets why Inception's weights cannot be had; None: they are here. Small CNNs are trained for a moment."""
    monkeypatch.setattr(trained_cnn, "FEWEST_STEPS", 2)
    monkeypatch.setattr(own_extractor, "missing_weights", lambda: found["reason"])
    found = {"reason": "no network"}
    return found


def experiment(folder, **options):
    data = {
        "name": "image_folder",
        "path": str(write_tree(folder / "images", class_files(20))),
        "heldout": 0.2,
        **options,
    }
    return image_experiment({"model": {"name": "DiT-S/2"}, "objective": "flow", "data": data})


def test_only_the_digits_are_evaluated_by_the_digits_network(tmp_path):
    digits = image_experiment({"model": {"name": "DiT-S/2"}, "objective": "flow", "data": "digits"})
    assert digits.eval.extractor == DigitsCNNConfig() and experiment(tmp_path).eval.extractor is None


def test_inception_is_taken_if_its_weights_are_here_and_otherwise_a_cnn_is_trained_once_and_kept(
    tmp_path, weights, capsys
):
    own, run = experiment(tmp_path, reserve=0.3), tmp_path / "run"
    reserved = own_extractor.open_data(own.images, "extractor")
    assert f"trained_cnn, which learns from the {len(reserved)} images" in describe_choice(own)
    extractor = extractor_of(own, run)
    assert "no network; features are those of a small CNN" in capsys.readouterr().err
    facts = json.loads((run / "extractor" / "extractor.json").read_text())
    assert facts["class_names"] == ["ant", "bee"] and facts["images"] == len(reserved)
    assert facts["fingerprint"] == reserved.fingerprint and 0 <= facts["accuracy"] <= 1
    assert f"a CNN that learned from {len(reserved)} images only" in extractor.caveat
    weights["reason"] = None  # what the run was evaluated with stays
    assert chosen_config(None, run) == TrainedCNNConfig(weights=str(run / "extractor"))
    assert extractor_of(own, run).name == extractor.name
    assert chosen_config(None, tmp_path / "other") == InceptionConfig()
    assert describe_choice(own) == "inception"


def test_without_images_set_aside_the_remedies_are_said(tmp_path, weights):
    own = experiment(tmp_path)
    with pytest.raises(ConfigError, match=r"eval.extractor is not set, .* set data.reserve=0.1 .*, or name"):
        extractor_of(own, tmp_path / "run")
    assert "set data.reserve=0.1" in describe_choice(own) and not (tmp_path / "run").exists()


def test_what_is_wrong_with_the_images_is_not_taken_for_nothing_being_set_aside(tmp_path, weights):
    own = experiment(tmp_path, reserve=0.3)
    (tmp_path / "images" / "ant").rename(tmp_path / "images" / "1")
    (tmp_path / "images" / "bee").rename(tmp_path / "images" / "01")
    with pytest.raises(ValueError, match="the class folders 01 and 1 are one label; join them"):
        extractor_of(own, tmp_path / "run")
    assert "are one label; join them" in describe_choice(own)


def test_shares_that_leave_no_image_to_learn_from_are_said_rather_than_to_set_them(tmp_path, weights):
    said = describe_choice(experiment(tmp_path, reserve=1e-9))
    assert "otherwise data.heldout: " in said and "leave none of its 40 images to the split extractor" in said


@pytest.fixture
def run(tmp_path, weights):
    """Trained for a moment on the images of `experiment`, and not evaluated yet."""
    data = config.dump(experiment(tmp_path, reserve=0.3).data) | {"name": "image_folder"}
    model = {"name": "DiT-custom/4", "depth": 1, "width": 32, "heads": 2}
    sampled = {"sampler": {"name": "heun", "steps": 1}}
    config_tree = {"model": model, "objective": "flow", "data": data, "eval": {"extractor": "trained_cnn", "seeds": 1}}
    train({**config_tree, "sample": sampled, "train": {"steps": 1, "batch_size": 4}}, run=tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (4, {"metrics": "fid"}, "--metrics fid is of the Inception network, and the extractor is trained_cnn"),
        (4, {"metrics": "sfd"}, "sfd needs spatial features, and .* has none .*; take --extractor inception"),
        (4, {"channels": 1}, "--extractor trained_cnn takes images of 3 channels, not 1; give --channels 3"),
        (1, {}, "has 1 image; an evaluation needs at least 2"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_a_network_is_trained(run, count, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate([str(run)], [f"count={count}"], EvalOptions(**options))
    assert not (run / "extractor").exists()


def test_the_cnn_of_the_run_is_what_its_config_and_the_command_mean_by_trained_cnn(run):
    by_config, by_command = (
        evaluate([str(run)], ["count=4"], EvalOptions(extractor=name))[0] for name in (None, "trained_cnn")
    )
    assert by_config.provenance.extractor == by_command.provenance.extractor
    assert (
        by_config.provenance.extractor["sha256"]
        == json.loads((run / "extractor/extractor.json").read_text())["weights_sha256"]
    )
