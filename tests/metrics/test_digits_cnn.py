import re

import numpy as np
import pytest
import torch

from dit_moe.data import DATASETS
from dit_moe.data.digits import DigitsConfig
from dit_moe.metrics import EXTRACTORS, FeatureMoments, digits_cnn, frechet_distance
from dit_moe.metrics.digits_cnn import DigitsCNNConfig


@pytest.fixture(scope="module")
def extractor():
    return EXTRACTORS.build(DigitsCNNConfig())


def heldout():
    dataset = DATASETS.build(DigitsConfig(), "heldout")
    batch = dataset.__getitems__(range(len(dataset)))
    return batch["images"].permute(0, 2, 3, 1).numpy(), batch["labels"]


def test_it_reads_held_out_digits(extractor):
    images, labels = heldout()
    accuracy = (extractor(images).logits_NK.argmax(1) == labels).double().mean()
    assert accuracy >= 0.99  # 448 of 450 when committed


def test_its_features_are_64_and_all_of_them_vary(extractor):
    features = extractor(heldout()[0]).features_ND
    assert features.shape == (450, extractor.dim) and features.dtype == torch.float64
    spread = torch.linalg.eigvalsh(FeatureMoments.of(features).covariance())
    assert spread.min() > 1e-5 * spread.max()  # 8.6e-5 when committed; a dead feature would give 0


def test_features_of_an_image_do_not_depend_on_the_images_around_it(extractor):
    images = np.tile(heldout()[0], (2, 1, 1, 1))[:600]  # three batches, the last one smaller
    alone = torch.cat([extractor(image[None]).features_ND for image in images[::50]])
    # float64 kernels differ with the batch size: worst 5.3e-15, at features up to 13
    torch.testing.assert_close(extractor(images).features_ND[::50], alone, rtol=0, atol=1e-12)


def test_other_weights_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    content = bytearray(digits_cnn.WEIGHTS.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} has sha256 \w{{64}}, not {digits_cnn.SHA256}"):
        digits_cnn.load(path, digits_cnn.SHA256)


@pytest.mark.parametrize("shape", [(32, 32, 3), (8, 16, 1), (12, 12, 1), (4, 4, 1), (0, 0, 1)])
def test_images_of_another_shape_are_refused(extractor, shape):
    wanted = "square images of 1 channel whose side is a multiple of 8"
    with pytest.raises(ValueError, match=f"digits_cnn64 takes {wanted}, not of shape {re.escape(str(shape))}"):
        extractor(np.zeros((2, *shape), np.uint8))


@pytest.mark.parametrize("factor", [2, 4, 5])
def test_larger_images_have_the_features_of_their_means_over_areas(extractor, factor):
    images = heldout()[0][:50]
    blocks = images.repeat(factor, 1).repeat(factor, 2)
    torch.testing.assert_close(extractor(blocks).features_ND, extractor(images).features_ND, rtol=0, atol=1e-12)
    blocks[:, ::factor] ^= 1  # one row in each block, by one grey level
    means = blocks.reshape(50, 8, factor, 8, factor, 1).mean((2, 4))
    with torch.inference_mode():
        expected, _ = extractor.network(torch.from_numpy(means).permute(0, 3, 1, 2))
    torch.testing.assert_close(extractor(blocks).features_ND, expected, rtol=0, atol=1e-12)


def test_enlarged_digits_are_as_well_read_and_as_far_from_the_training_set_as_the_originals(extractor):
    floors = []
    for size in (8, 32):
        sets = [DATASETS.build(DigitsConfig(size=size), split) for split in ("train", "heldout")]
        batches = [each.__getitems__(range(len(each))) for each in sets]
        train, held = (extractor(batch["images"].permute(0, 2, 3, 1).numpy()) for batch in batches)
        assert (held.logits_NK.argmax(1) == batches[1]["labels"]).double().mean() == 448 / 450
        a, b = (FeatureMoments.of(each.features_ND) for each in (train, held))
        floors.append(frechet_distance(a.mean_D, a.covariance(), b.mean_D, b.covariance()))
    assert floors[1] == pytest.approx(floors[0], rel=0.01)  # 1.9320 and 1.9401 when the method was chosen
