"""The small CNN that learns from a user's own images."""

import pytest
import torch

from dit_moe.extractors import EXTRACTORS
from dit_moe.extractors.trained_cnn import (
    WEIGHTS,
    TrainedCNNConfig,
    accuracy,
    fit,
    mixed,
    resized,
    save,
    steps_for,
    turned,
)
from dit_moe.metrics import FeatureMoments, frechet_distance
from tests.extractors.random_networks import noise, save_random_cnn


def build(folder):
    return EXTRACTORS.build(TrainedCNNConfig(weights=str(folder)))


@pytest.fixture(scope="module")
def two_classes():
    """Dark and bright noise, and which is which."""
    labels = torch.arange(64) % 2
    return (noise(64, side=12) // 3 + 128 * labels[:, None, None, None]).byte(), labels


def test_the_same_seed_gives_the_same_network_and_its_classes_are_told_apart(two_classes):
    images, labels = resized(two_classes[0]), two_classes[1]
    first, again = (fit(images, labels, 2, steps=15) for _ in range(2))
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert accuracy(first, images, labels) > 0.9


def test_distances_grow_as_images_turn_into_noise_of_either_kind(two_classes):
    images, labels = two_classes
    network = fit(resized(images), labels, 2, steps=60)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        twice = resized(images[32:]).repeat_interleave(2, 0)  # once for either kind
        blended = [mixed(twice, torch.full((64,), share)) for share in (0, 0.2, 0.4, 0.6, 0.8, 1)]

    def distance(one, other):
        sides = [FeatureMoments.of(network(each)[0].detach().double()) for each in (one, other)]
        return frechet_distance(*(part for each in sides for part in (each.mean_D, each.covariance())))

    for kind in range(2):
        found = [distance(resized(images[:32]), each[kind::2]) for each in blended]
        assert found == sorted(found) and len(set(found)) == 6


def test_what_noise_is_mixed_with_keeps_the_rest_of_an_image():
    images = resized(noise(4))
    assert torch.allclose(mixed(images, torch.zeros(4)), images, atol=1e-4)  # rounding of float32 at 255 is 2e-5
    gauss, uniform = mixed(images, torch.ones(4))[:2]
    assert 85 < gauss.std() < 98 and 70 < uniform.std() < 77  # 91.6, as it is clipped, and 73.6
    assert gauss.min() >= 0 and gauss.max() <= 255


def test_a_network_from_before_noise_was_learned_is_read_as_it_was(two_classes, tmp_path):
    folder = save_random_cnn(tmp_path / "new", *two_classes)
    newer = build(folder)
    assert newer.identity()["learned"] == "classes and noise of 64 images"
    older = {name: fact for name, fact in newer.facts.items() if name not in ("version", "format", "sha256")}
    save(newer.network, older, tmp_path / "old")
    again = build(tmp_path / "old")
    assert again.name == newer.name and again.identity()["learned"] == "classes of 64 images"


def test_what_was_saved_is_read_again_and_its_name_has_the_hash_of_the_weights(two_classes, tmp_path):
    images, labels = two_classes
    extractor = build(save_random_cnn(tmp_path / "extractor", images, labels))
    assert extractor.name == f"trained_cnn64_{extractor.sha256[:8]}" and not extractor.is_fid
    assert extractor.classes == 2 and "class_accuracy" in extractor.metrics
    assert extractor.identity()["learned"] == "classes and noise of 64 images"
    weights = tmp_path / "extractor" / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors is not what extractor.json beside it describes"):
        build(tmp_path / "extractor")


def test_without_classes_it_learns_turns_and_classifies_nothing(tmp_path):
    extractor = build(save_random_cnn(tmp_path / "extractor"))
    assert extractor.classes is None and extractor.logits(torch.zeros(1, 64)) is None
    assert "class_accuracy" not in extractor.metrics
    images, turns = turned(noise(4, side=6).float())
    assert turns.tolist() == [0, 1, 2, 3]
    for image, turn in zip(images, turns.tolist(), strict=True):
        assert torch.equal(image.rot90(-turn, (1, 2)), noise(4, side=6).float()[turn])


@pytest.mark.parametrize("weights, problem", [(None, "of which run"), ("nowhere", "nowhere holds no extractor.json")])
def test_a_folder_without_a_network_is_refused(weights, problem):
    with pytest.raises(ValueError, match=problem):
        EXTRACTORS.build(TrainedCNNConfig(weights=weights))


def test_few_images_are_learned_from_in_fewer_steps():
    assert [steps_for(images) for images in (1, 65, 800, 1600, 2000, 20_000)] == [100, 100, 500, 1000, 1000, 1000]
