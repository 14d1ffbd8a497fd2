"""The digits' own extractor: what its features are worth, and which images it takes."""

import re

import pytest
import torch

from dit_moe.data import DATASETS
from dit_moe.data.digits import DigitsConfig
from dit_moe.extractors import EXTRACTORS, digits_cnn
from dit_moe.extractors.digits_cnn import DigitsCNNConfig
from dit_moe.metrics import FeatureMoments, frechet_distance


@pytest.fixture(scope="module")
def extractor():
    return EXTRACTORS.build(DigitsCNNConfig())


def split(name: str, size: int = 8):
    dataset = DATASETS.build(DigitsConfig(size=size), name)
    batch = dataset.__getitems__(range(len(dataset)))
    return batch["images"], batch["labels"]


def accuracy(extractor, features, labels):
    return (extractor.logits(features).argmax(1) == labels).double().mean()


def test_it_reads_held_out_digits_by_64_features_that_all_vary(extractor):
    images, labels = split("heldout")
    features = extractor(images).features_BD
    with torch.inference_mode():
        torch.testing.assert_close(extractor.logits(features), extractor.network(images)[1], rtol=0, atol=1e-12)
    assert accuracy(extractor, features, labels) >= 0.99  # 448 of 450 when committed
    assert features.shape == (450, extractor.dim) and features.dtype == torch.float64
    spread = torch.linalg.eigvalsh(FeatureMoments.of(features).covariance())
    assert spread.min() > 1e-5 * spread.max()  # 8.6e-5 when committed; a dead feature would give 0


def test_other_weights_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    content = bytearray(digits_cnn.WEIGHTS.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} has sha256 \w{{64}}, not {digits_cnn.SHA256}"):
        digits_cnn.load(path, digits_cnn.SHA256)


@pytest.mark.parametrize(
    "shape, remedy",
    [
        ((3, 32, 32), ""),  # grey levels of other images would be taken for digits: the numbers mean nothing
        ((1, 8, 16), "--size 8 (or another multiple of 8), or "),
        ((1, 0, 0), "--size 8 (or another multiple of 8), or "),
    ],
)
def test_images_of_another_shape_are_refused_with_the_options_that_would_help(extractor, shape, remedy):
    found = "×".join(map(str, shape))
    problem = (
        f"takes digits: square images of 1 channel whose side is a multiple of 8, not {found}; give {remedy}another"
    )
    for look in (lambda: extractor.check(shape), lambda: extractor(torch.zeros(2, *shape, dtype=torch.uint8))):
        with pytest.raises(ValueError, match=re.escape(f"--extractor digits_cnn64 {problem} --extractor")):
            look()


@pytest.mark.parametrize("factor", [2, 5])
def test_larger_images_have_the_features_of_their_means_over_areas(extractor, factor):
    images = split("heldout")[0][:50]
    blocks = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    torch.testing.assert_close(extractor(blocks).features_BD, extractor(images).features_BD, rtol=0, atol=1e-12)
    blocks[:, :, ::factor] ^= 1  # one row in each block, by one grey level
    means = blocks.double().unflatten(3, (8, factor)).unflatten(2, (8, factor)).mean((3, 5))
    with torch.inference_mode():
        expected, _ = extractor.network(means)
    torch.testing.assert_close(extractor(blocks).features_BD, expected, rtol=0, atol=1e-12)


def test_enlarged_digits_are_as_well_read_and_as_far_from_the_training_set_as_the_originals(extractor):
    floors = []
    for size in (8, 32):
        images, labels = split("heldout", size)
        held, train = (extractor(each).features_BD for each in (images, split("train", size)[0]))
        assert accuracy(extractor, held, labels) == 448 / 450
        a, b = map(FeatureMoments.of, (train, held))
        floors.append(frechet_distance(a.mean_D, a.covariance(), b.mean_D, b.covariance()))
    assert floors[1] == pytest.approx(floors[0], rel=0.01)  # 1.9320 and 1.9401 when the method was chosen


def test_fitting_learns_is_repeatable_and_leaves_the_global_generator_alone():
    images, labels = split("extractor")
    before = torch.get_rng_state()
    network = digits_cnn.fit(images, labels, steps=150, seed=1)
    first, again = (digits_cnn.fit(images, labels, steps=5, seed=1) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert (network(images)[1].argmax(1) == labels).double().mean() > 0.8  # 0.90 to 0.93 for seeds 0 to 4
