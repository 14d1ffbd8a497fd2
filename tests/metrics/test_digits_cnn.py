import numpy as np
import pytest
import torch

from dit_moe.data import DATASETS
from dit_moe.data.digits import DigitsConfig
from dit_moe.metrics import EXTRACTORS, FeatureMoments, digits_cnn
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


def test_images_of_another_shape_are_refused(extractor):
    with pytest.raises(ValueError, match=r"digits_cnn64 takes images of shape \(8, 8, 1\), not \(32, 32, 3\)"):
        extractor(np.zeros((2, 32, 32, 3), np.uint8))
