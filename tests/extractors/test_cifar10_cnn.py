"""CIFAR-10's own extractor: where it is chosen, and that its weights are the recorded ones."""

import shutil

import pytest

from dit_moe.experiments.image import load_experiment
from dit_moe.extractors import EXTRACTORS, cifar10_cnn
from dit_moe.extractors.cifar10_cnn import WEIGHTS, Cifar10CNNConfig
from tests.extractors.random_networks import noise, save_random_cnn


@pytest.mark.parametrize("config", ["cifar10", "cifar10_tiny"])
def test_cifar_10_is_judged_by_it_also_from_a_folder_and_other_sets_are_not(config):
    assert load_experiment(config, ["data.path=photos"]).eval.extractor == Cifar10CNNConfig()
    assert load_experiment(config, ["data.set=cifar100"]).eval.extractor is None


def test_it_tells_the_ten_classes_from_64_features_and_is_no_larger_than_400_kb():
    extractor = EXTRACTORS.build(Cifar10CNNConfig())
    features = extractor(noise(4, 32)).features_BD
    assert extractor.logits(features).shape == (4, extractor.classes) == (4, 10)
    assert extractor.name == "cifar10_cnn64" and extractor.facts["class_names"][::9] == ["airplane", "truck"]
    assert extractor.facts["accuracy"] > 0.63 and extractor.identity()["learned"] == "classes and noise of 4010 images"
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) < 400_000


def test_other_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10_cnn, "WEIGHTS", tmp_path / "other")
    save_random_cnn(tmp_path / "other")
    with pytest.raises(ValueError, match=rf"has weights of the sha256 \w{{64}}, not {cifar10_cnn.SHA256}: .*; restore"):
        EXTRACTORS.build(Cifar10CNNConfig())
    shutil.copy(WEIGHTS / "model.safetensors", tmp_path / "other")
    with pytest.raises(ValueError, match=r"is not what extractor\.json beside it describes; restore both from a copy$"):
        EXTRACTORS.build(Cifar10CNNConfig())
