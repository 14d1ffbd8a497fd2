"""What every registered first stage promises, and how latents are drawn."""

import pytest
import torch

from dit_moe.latents import FIRST_STAGES, Moments
from dit_moe.latents.identity import IdentityConfig

IMAGE_SHAPE = (3, 32, 32)


@pytest.fixture(params=FIRST_STAGES.names())
def example(request):
    images = torch.randint(256, (3, *IMAGE_SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return FIRST_STAGES.build(FIRST_STAGES.config_class(request.param)()), images


def test_encoded_latents_are_float32_of_the_predicted_shape(example):
    stage, images = example
    for moment in filter(lambda moment: moment is not None, stage.encode(images)):
        assert moment.dtype == torch.float32
        assert moment.shape == (3, *stage.latent_shape(tuple(images.shape[1:])))


def test_decoded_latents_are_uint8_images_of_the_same_shape(example):
    stage, images = example
    decoded = stage.decode(stage.encode(images).mean)
    assert decoded.dtype == torch.uint8 and decoded.shape == images.shape


def test_encoding_floats_is_refused(example):
    stage, images = example
    with pytest.raises(ValueError, match="uint8"):
        stage.encode(images.float())


def test_latents_that_are_not_finite_are_refused(example):
    stage, images = example
    latents = stage.encode(images).mean
    latents[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        stage.decode(latents)


def test_the_identity_loses_nothing():
    stage = FIRST_STAGES.build(IdentityConfig())
    images = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    assert torch.equal(stage.decode(stage.encode(images).mean), images)


def test_a_deterministic_stage_draws_no_random_numbers():
    def never(like):
        raise AssertionError("noise was drawn")

    mean = torch.randn(2, 4, 3, 3)
    assert Moments(mean).sample(never) is mean


def test_latents_are_drawn_as_mean_plus_std_times_noise():
    mean, std, noise = torch.randn(3, 2, 4, 3, 3).unbind(0)
    assert torch.equal(Moments(mean, std).sample(lambda like: noise), mean + std * noise)
