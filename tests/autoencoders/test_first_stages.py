"""What every registered first stage promises, and how latents are drawn."""

import pytest
import torch

from dit_moe.autoencoders import FIRST_STAGES, Moments
from dit_moe.autoencoders.autoencoder import AutoencoderConfig
from dit_moe.autoencoders.base import IdentityConfig
from tests.autoencoders.small import make

IMAGE_SHAPE = (3, 32, 32)


EXAMPLES = {
    "identity": lambda folder: IdentityConfig(),
    "autoencoder": lambda folder: AutoencoderConfig(model=make(folder)),
}


@pytest.fixture(params=FIRST_STAGES.names())
def example(request, tmp_path):
    assert request.param in EXAMPLES, f"give {request.param} an example here"
    images = torch.randint(256, (3, *IMAGE_SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return FIRST_STAGES.build(EXAMPLES[request.param](tmp_path)), images


def test_encoded_latents_are_float32_of_the_predicted_shape(example):
    stage, images = example
    for moment in filter(lambda moment: moment is not None, stage.encode(images)):
        assert moment.dtype == torch.float32
        assert moment.shape == (3, *stage.latent_shape(tuple(images.shape[1:])))


def test_decoded_latents_are_uint8_images_of_the_same_shape(example):
    stage, images = example
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
