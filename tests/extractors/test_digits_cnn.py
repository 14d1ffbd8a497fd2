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


def heldout():
    return split("heldout")


def accuracy(extractor, features, labels):
    return (extractor.logits(features).argmax(1) == labels).double().mean()


def test_it_reads_held_out_digits(extractor):
    images, labels = heldout()
    assert accuracy(extractor, extractor(images).features_BD, labels) >= 0.99  # 448 of 450 when committed


def test_its_features_are_64_and_all_of_them_vary(extractor):
    features = extractor(heldout()[0]).features_BD
    assert features.shape == (450, extractor.dim) and features.dtype == torch.float64
    spread = torch.linalg.eigvalsh(FeatureMoments.of(features).covariance())
    assert spread.min() > 1e-5 * spread.max()  # 8.6e-5 when committed; a dead feature would give 0


def test_features_of_an_image_do_not_depend_on_the_images_around_it(extractor):
    images = heldout()[0]
    alone = torch.cat([extractor(image[None]).features_BD for image in images[::50]])
    # float64 kernels differ with the batch size: worst 5.3e-15, at features up to 13
    torch.testing.assert_close(extractor(images).features_BD[::50], alone, rtol=0, atol=1e-12)


def test_logits_follow_from_features_alone(extractor):
    images = heldout()[0][:50]
    with torch.inference_mode():
        _, expected = extractor.network(images)
    torch.testing.assert_close(extractor.logits(extractor(images).features_BD), expected, rtol=0, atol=1e-12)


def test_other_weights_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    content = bytearray(digits_cnn.WEIGHTS.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} has sha256 \w{{64}}, not {digits_cnn.SHA256}"):
        digits_cnn.load(path, digits_cnn.SHA256)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 16), (1, 12, 12), (1, 4, 4), (1, 0, 0)])
def test_images_of_another_shape_are_refused(extractor, shape):
    found = re.escape("×".join(map(str, shape)))
    wanted = f"square images of 1 channel whose side is a multiple of 8, not {found}"
    for look in (lambda: extractor.check(shape), lambda: extractor(torch.zeros(2, *shape, dtype=torch.uint8))):
        with pytest.raises(ValueError, match=f"--extractor digits_cnn64 takes {wanted}; try --.*, or another"):
            look()


@pytest.mark.parametrize("factor", [2, 4, 5])
def test_larger_images_have_the_features_of_their_means_over_areas(extractor, factor):
    images = heldout()[0][:50]
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


def test_only_the_options_that_would_help_are_named(extractor):
    for shape, hint in {
        (3, 8, 8): "try --channels 1, or another --extractor",
        (1, 9, 9): r"try --size 8 \(or another multiple of 8\), or another --extractor",
        (3, 9, 9): r"try --channels 1, --size 8 \(or another multiple of 8\), or another",
    }.items():
        with pytest.raises(ValueError, match=hint):
            extractor.check(shape)


def test_its_logits_are_of_the_digits_own_labels(extractor):
    assert extractor.has_logits and extractor.classes == 10
    assert extractor.logits(torch.zeros(2, 64)).shape == (2, 10)
