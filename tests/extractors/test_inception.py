"""The Inception of FID, with random weights, against torch-fidelity."""

import hashlib
import itertools
import re

import pytest
import torch
from PIL import Image

from dit_moe.extractors import EXTRACTORS, inception
from dit_moe.extractors.inception import InceptionConfig
from dit_moe.metrics.classifier import inception_score
from dit_moe.metrics.kid import kernel_distance
from dit_moe.metrics.manifold import precision_recall
from tests.extractors.random_networks import noise

EACH = 8  # samples and references: there are 3 images/s


@pytest.fixture(scope="module")
def extractor(inception_weights):
    return EXTRACTORS.build(InceptionConfig(weights=str(inception_weights), verify=False))


@pytest.fixture(scope="module")
def images():
    return noise(2 * EACH)


@pytest.fixture(scope="module")
def features(extractor, images):
    return extractor(images)


@pytest.fixture(scope="module")
def fidelity(images, inception_weights, tmp_path_factory):
    """torch-fidelity's own numbers, of image files."""
    import torch_fidelity

    folders = [tmp_path_factory.mktemp(name) for name in ("samples", "reference")]
    for folder, part in zip(folders, images.split(EACH), strict=True):
        for i, image in enumerate(part):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        isc=True,
        kid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_weights),
        isc_splits=1,
        samples_shuffle=False,
        kid_subset_size=EACH,
        batch_size=EACH,
        save_cpu_ram=True,  # reads without processes of its own
        cuda=False,
        cache=False,
        verbose=False,
    )


def test_features_are_torch_fidelitys_and_spatial_ones_adms(extractor, images, inception_weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    names = ["2048", "logits_unbiased"]
    network = FeatureExtractorInceptionV3("its own", names, feature_extractor_weights_path=str(inception_weights))
    features, answers = extractor(images[:4]), []
    network.Mixed_6d.register_forward_hook(lambda module, inputs, output: answers.append(output))
    with torch.no_grad():
        pooled, logits = network(images[:4])
    # To the last bit when written, but kernels may differ with alignment
    torch.testing.assert_close(features.features_BD, pooled, rtol=1e-5, atol=1e-6)
    assert features.features_BD.mean() > 0.1 and features.features_BD.std(0).mean() > 0.1  # not of a dead network
    # theirs are sums of 2048 terms in fp32, ours in float64: 2.4e-5 apart, where they reach 58
    torch.testing.assert_close(extractor.logits(features.features_BD), logits, rtol=0, atol=1e-6 * logits.abs().max())
    spatial, order = features.spatial_BS, itertools.product(range(17), range(17), range(7))
    # the 1×1 convolution's channels come first
    expected = torch.stack([answers[0][:, channel, row, column] for row, column, channel in order], 1)
    assert spatial.shape == (4, 2023) and spatial.dtype == torch.float32
    torch.testing.assert_close(spatial, expected, rtol=1e-5, atol=1e-6)
    assert spatial.min() == 0 and spatial.std(0).mean() > 0.1  # after the ReLU


def test_the_numbers_are_torch_fidelitys(extractor, features, fidelity):
    """The distance is held against it in metrics/test_frechet: of 2048 features it takes a minute."""
    ours, theirs = features.features_BD.split(EACH)

    score = inception_score(extractor.logits(ours)).mean
    assert score == pytest.approx(fidelity["inception_score_mean"], rel=1e-6) and score > 1.5
    kid = kernel_distance(ours, theirs, subset_size=EACH).mean  # all images: the only subset
    assert kid == pytest.approx(fidelity["kernel_inception_distance_mean"], rel=1e-6)  # its kernels are fp32
    precision, recall = precision_recall(ours, theirs)
    assert (precision, recall) == pytest.approx((fidelity["precision"], fidelity["recall"]), abs=1e-6)
    assert 0 < precision < 1 or 0 < recall < 1  # else this would say nothing


def test_only_the_official_weights_give_fid(extractor, inception_weights, monkeypatch):
    assert not extractor.is_fid and re.fullmatch("inception_[0-9a-f]{8}", extractor.name)
    assert extractor.has_logits and extractor.classes is None  # in an order that is no data set's
    found = hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"sha256 {found}, .* has {inception.SHA256}; .* --any-weights"):
        EXTRACTORS.build(InceptionConfig(weights=str(inception_weights)))
    monkeypatch.setattr(inception, "SHA256", found)
    official = EXTRACTORS.build(InceptionConfig(weights=str(inception_weights)))
    assert official.is_fid and official.name == "inception" and official.sha256 == found


def test_the_official_hash_is_that_of_torch_fidelitys_download():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert inception.SHA256 == "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
    assert URL_INCEPTION_V3.endswith(f"-{inception.SHA256[:8]}.pth")


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    with pytest.raises(ValueError, match=f"{path} does not hold the weights of Inception .*--weights"):
        EXTRACTORS.build(InceptionConfig(weights=str(path), verify=False))
