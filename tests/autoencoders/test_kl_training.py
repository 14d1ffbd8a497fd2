from dataclasses import replace

import pytest
import torch

from dit_moe.autoencoders.base import from_uint8
from dit_moe.autoencoders.kl import KLConfig, KLLoss, KLLossConfig, KLNetwork, kl_nats
from dit_moe.config import ConfigError
from dit_moe.data import DATASETS
from dit_moe.data.digits import DigitsConfig
from dit_moe.randomness import BatchRandom
from dit_moe.training import TrainConfig, Trainer
from dit_moe.training.log import read_log

TINY = KLConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, attention=False)
SHAPE = (1, 8, 8)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return KLNetwork(TINY.build(SHAPE))


def pixels(count=3):
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def random_of(count=3, step=0):
    return BatchRandom(0, "train", step, total=count)


def test_the_divergence_is_that_of_two_gaussians_and_0_for_equal_ones():
    mean, logvar = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    ours, unit = torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0, 1)
    expected = torch.distributions.kl_divergence(ours, unit).sum() / 5
    assert torch.allclose(kl_nats(mean, logvar), expected)
    assert kl_nats(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3)) == 0


def test_the_network_decodes_one_draw_of_the_latents(network):
    (decoded, mean, logvar), aux = network(pixels(), random_of(), return_aux=True)
    noise = random_of().normal(*mean.shape[1:])
    expected = network.autoencoder.decode(mean + (logvar / 2).exp() * noise).sample
    assert torch.allclose(decoded, expected, atol=1e-6) and aux == {} == dict(network.aux_weights)


@pytest.mark.parametrize("reconstruction, power", [("l1", 1), ("l2", 2)])
def test_the_loss_is_the_weighted_sum_of_its_terms(reconstruction, power):
    images, decoded = pixels(), pixels().flip(0)
    mean, logvar = torch.full((3, 4, 4, 4), 2.0), torch.zeros(3, 4, 4, 4)
    loss = KLLoss(KLLossConfig(reconstruction=reconstruction, kl_weight=0.25))
    terms = loss(lambda *args: (decoded, mean, logvar), {"images": images}, random_of())
    assert set(terms) == {"loss", "reconstruction", "kl"}
    assert torch.allclose(terms["reconstruction"], (decoded - images).abs().pow(power).mean())
    assert terms["kl"] == 0.5 * 2**2 * 64 / 64  # 64 latents of mean 2 and std 1, over 64 pixel values
    assert torch.allclose(terms["loss"], terms["reconstruction"] + 0.25 * terms["kl"])


def test_each_level_but_the_last_halves_the_image():
    for channels, size in (((8,), 8), ((8, 8), 4), ((8, 16, 8), 2)):
        network = replace(TINY, block_out_channels=channels).build(SHAPE)
        assert network.encode(pixels()).latent_dist.mean.shape == (3, 4, size, size)
        assert network.decode(torch.zeros(1, 4, size, size)).sample.shape == (1, *SHAPE)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: TINY.build((1, 8, 9)), r"\[8, 8\] .* multiples of 2 pixels, not 8×9; drop an entry"),
        (lambda: replace(TINY, block_out_channels=(8, 6)), "must be multiples of norm_num_groups=4"),
        (lambda: replace(TINY, block_out_channels=()), "block_out_channels="),
        (lambda: replace(TINY, layers_per_block=0), "layers_per_block=0 must be at least 1"),
        (lambda: KLLossConfig(lpips_weight=0.5), r"lpips_weight=0\.5 needs the network's weights; set lpips_folder"),
        (lambda: KLLossConfig(kl_weight=-1.0), r"kl_weight=-1\.0 must be at least 0"),
    ],
)
def test_shapes_and_weights_that_cannot_be_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


# ------------------------------------------------------------------------------------------------------- the training


def test_a_training_learns(tmp_path):
    settings = TrainConfig(steps=20, batch_size=16, lr=2e-3, log_every=1, checkpoint_every=20)
    torch.manual_seed(0)
    Trainer(
        settings,
        model=KLNetwork(TINY.build(SHAPE)),
        objective=KLLoss(KLLossConfig(kl_weight=1e-3)),
        dataset=DATASETS.build(DigitsConfig(), "train"),
        prepare_batch=lambda rows, random: {"images": from_uint8(rows["images"])},
        run=tmp_path,
        config_yaml="",
        seed=0,
    ).train()
    first, *_, last = read_log(tmp_path / "log.jsonl")
    assert last["reconstruction"] < 0.8 * first["reconstruction"]
    assert last["loss"] == pytest.approx(last["reconstruction"] + 1e-3 * last["kl"])
