"""What every registered extractor promises."""

import json
import re

import pytest
import torch

from dit_moe.extractors import EXTRACTORS, key_of
from dit_moe.extractors.cifar10_cnn import Cifar10CNNConfig
from dit_moe.extractors.digits_cnn import DigitsCNNConfig
from dit_moe.metrics import METRICS
from tests.extractors.random_networks import noise, save_random_cnn

SHAPES = {"digits_cnn64": (1, 16, 16)}  # (C, H, W) that it takes, if not (3, 40, 32)


def example(name, request, tmp_path_factory):
    """Options for the entry `name`."""
    if name == "function":
        folder = tmp_path_factory.mktemp("function")
        code = "def rough(images):\n    return images.double()[:, :, ::8, ::8].flatten(1)\n"
        (folder / "example_features.py").write_text(code)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(folder))
            return EXTRACTORS.build(EXTRACTORS.config_class(name)(path="example_features:rough"))
    if EXTRACTORS.config_class(name) in (Cifar10CNNConfig, DigitsCNNConfig):
        return EXTRACTORS.build(EXTRACTORS.config_class(name)())
    if name == "trained_cnn":
        folder = tmp_path_factory.mktemp("trained") / "extractor"
        save_random_cnn(folder)
        return EXTRACTORS.build(EXTRACTORS.config_class(name)(weights=str(folder)))
    options = {"inception": {"verify": False}, "dinov2": {"model": "vit_small_patch14_dinov2"}}
    assert name in options, f"the extractor {name} is registered without an example; add one to {__file__}"
    weights = str(request.getfixturevalue(f"{name}_weights"))
    return EXTRACTORS.build(EXTRACTORS.config_class(name)(weights=weights, **options[name]))


@pytest.fixture(scope="module", params=EXTRACTORS.names())
def name(request):
    return request.param


@pytest.fixture(scope="module")
def extractor(name, request, tmp_path_factory):
    return example(name, request, tmp_path_factory)


@pytest.fixture(scope="module")
def images(name):
    channels, height, width = SHAPES.get(name, (3, 40, 32))
    return noise(3, 40)[:, :channels, :height, :width].contiguous()


@pytest.fixture(scope="module")
def features(extractor, images):
    extractor.check(tuple(images.shape[1:]))
    return extractor(images)


def test_images_of_another_number_of_channels_are_refused_naming_the_option(name, extractor, images):
    if name != "function":  # which takes images of any number of channels
        wanted = images.shape[1]
        remedy = "another --extractor" if name == "digits_cnn64" else f"--channels {wanted}"
        with pytest.raises(ValueError, match=rf"--extractor {extractor.name} takes .*{remedy}"):
            extractor.check((4 - wanted, *images.shape[2:]))


def test_its_name_begins_with_the_registered_one_and_no_number_of_it_is_called_fid(name, extractor):
    assert re.fullmatch(rf"{name}\w*", extractor.name)
    assert extractor.is_fid is False  # no example has the weights of 2015
    assert not {key_of(each, extractor.name, extractor.is_fid) for each in ("fd", "sfd")} & {"fid", "sfid"}


def test_its_identity_is_json_with_the_hash_of_the_weights(extractor, features):
    identity = extractor.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity["name"] == extractor.name and identity.get("dim", extractor.dim) == extractor.dim
    assert re.fullmatch("[0-9a-f]{64}", identity["sha256"])


def test_features_are_as_stated(extractor, images, features):
    assert features.features_BD.shape == (3, extractor.dim) and extractor.dim > 0
    assert (features.spatial_BS is not None) == extractor.has_spatial
    logits = extractor.logits(features.features_BD)
    assert (logits is not None) == extractor.has_logits
    assert extractor.classes in (None, None if logits is None else logits.shape[1])
    for each in filter(lambda each: each is not None, (*features, logits)):
        assert each.dtype in (torch.float32, torch.float64) and each.device.type == "cpu" and not each.requires_grad
        assert len(each) == 3 and each.isfinite().all() and (each[0] != each[1]).any()


def test_an_image_has_the_same_features_beside_other_images(extractor, images, features):
    for alone, among in zip(extractor(images[1:2]), features, strict=True):
        if among is not None:  # kernels differ with the batch: worst 1e-5 of DINOv2's, up to 4; 5e-15 in float64
            tolerance = 1e-12 if among.dtype == torch.float64 else 1e-4
            torch.testing.assert_close(alone[0], among[1], rtol=tolerance, atol=tolerance)


def test_autocast_and_reduced_precision_around_it_change_nothing(extractor, images, features):
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = extractor(images)
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(again.features_BD, features.features_BD, rtol=1e-5, atol=1e-5)


def test_its_default_metrics_are_registered_and_possible(extractor):
    assert set(extractor.metrics) <= set(METRICS.names())
    assert extractor.has_spatial or "sfd" not in extractor.metrics
    assert extractor.has_logits or "inception_score" not in extractor.metrics
    assert extractor.classes or "class_accuracy" not in extractor.metrics
