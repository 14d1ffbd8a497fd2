"""Which feature space a run is evaluated in where its config leaves that open."""

import json

import pytest

from dit_moe.config import ConfigError
from dit_moe.evaluation import own_extractor
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
    monkeypatch.setattr(trained_cnn.fit, "__kwdefaults__", trained_cnn.fit.__kwdefaults__ | {"steps": 2})
    monkeypatch.setattr(own_extractor, "missing_weights", lambda download=True: found["reason"])
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
    weights["reason"] = None  # what the run was evaluated with stays
    assert chosen_config(own, run) == TrainedCNNConfig(weights=str(run / "extractor"))
    assert extractor_of(own, run).name == extractor.name
    assert chosen_config(own, tmp_path / "other") == InceptionConfig()
    assert describe_choice(own) == "inception"


def test_without_images_set_aside_the_remedies_are_said(tmp_path, weights):
    own = experiment(tmp_path)
    with pytest.raises(ConfigError, match=r"eval.extractor is not set, .* set data.reserve=0.1 .*, or name"):
        chosen_config(own, tmp_path / "run")
    assert "set data.reserve=0.1" in describe_choice(own) and not (tmp_path / "run").exists()
