"""What every registered first stage promises, how latents are drawn, and how pixels become numbers."""

import pytest
import torch

from dit_moe.autoencoders import FIRST_STAGES, Moments
from dit_moe.autoencoders.autoencoder import AutoencoderConfig
from dit_moe.autoencoders.base import IdentityConfig, to_uint8
from tests.autoencoders.small import make

IMAGE_SHAPE = (3, 32, 32)
EVERY_GREY_LEVEL = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)

EXAMPLES = {
    "identity": lambda folder: IdentityConfig(),
    "autoencoder": lambda folder: AutoencoderConfig(model=make(folder)),
}


@pytest.fixture(params=FIRST_STAGES.names())
def example(request, tmp_path):
    assert request.param in EXAMPLES, f"give {request.param} an example here"
    images = torch.randint(256, (3, *IMAGE_SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return FIRST_STAGES.build(EXAMPLES[request.param](tmp_path)), images


def test_latents_are_float32_of_the_predicted_shape_and_images_uint8(example):
    stage, images = example
    for moment in filter(lambda moment: moment is not None, stage.encode(images)):
        assert moment.dtype == torch.float32
        assert moment.shape == (3, *stage.latent_shape(tuple(images.shape[1:])))
    decoded = stage.decode(stage.encode(images).mean)
    assert decoded.dtype == torch.uint8 and decoded.shape == images.shape


def test_encoding_is_the_normalisation_of_what_shards_would_keep(example):
    stage, images = example
    raw = stage.encode_raw(images) if hasattr(stage, "encode_raw") else stage.encode(images)
    rows = {"moments": torch.stack([moment for moment in raw if moment is not None], 1)}
    for wanted, found in zip(stage.encode(images), stage.moments_of(rows), strict=True):
        assert (wanted is None and found is None) or torch.equal(wanted, found)


def test_a_resolved_config_builds_the_same_stage(example):
    stage, images = example
    again = FIRST_STAGES.build(stage.resolved())
    assert torch.equal(again.encode(images).mean, stage.encode(images).mean)


def test_images_of_floats_and_latents_that_are_not_finite_are_refused(example):
    stage, images = example
    with pytest.raises(ValueError, match="float32; first stages take uint8"):
        stage.encode(images.float())
    latents = stage.encode(images).mean
    latents[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        stage.decode(latents)


def test_the_identity_loses_nothing():
    stage = FIRST_STAGES.build(IdentityConfig())
    latents = stage.encode(EVERY_GREY_LEVEL).mean
    assert latents.min() == -1 and latents.max() == 1
    assert torch.equal(stage.decode(latents), EVERY_GREY_LEVEL)


def test_a_deterministic_stage_draws_no_random_numbers():
    def never(like):
        raise AssertionError("noise was drawn")

    mean = torch.randn(2, 4, 3, 3)
    assert Moments(mean).sample(never) is mean


def test_latents_are_drawn_as_mean_plus_std_times_noise():
    mean, std, noise = torch.randn(3, 2, 4, 3, 3).unbind(0)
    assert torch.equal(Moments(mean, std).sample(lambda like: noise), mean + std * noise)


def test_floats_become_pixels_by_adms_rule_clamp_then_truncate():
    x = torch.tensor([-9.0, -1.0, -0.9999, 0.0, 0.9999, 1.0, 9.0])
    expected = [0, 0, 0, 128, 255, 255, 255]  # 127.5·x + 128 in between is 0.5, 0.51, 128, 255.49, 255.5
    assert to_uint8(x.view(1, 1, 1, 7)).flatten().tolist() == expected


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused_before_it_turns_black(value):
    images = torch.zeros(5, 1, 8, 8)
    images[3, 0, 1, 1] = value
    with pytest.raises(ValueError, match="1 of 5 images hold NaN or infinity, the first is number 3"):
        to_uint8(images)
