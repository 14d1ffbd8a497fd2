"""Held-out loss: the training objective at fixed noise and times."""

import math

import pytest
import torch

from dit_moe.autoencoders import FIRST_STAGES
from dit_moe.autoencoders.base import IdentityConfig
from dit_moe.config import ConfigError
from dit_moe.data import DATASETS
from dit_moe.data.digits import DigitsConfig
from dit_moe.diffusion import OBJECTIVES
from dit_moe.diffusion.ddpm import DDPMConfig
from dit_moe.diffusion.flow import FlowConfig
from dit_moe.evaluation.heldout_loss import HeldoutConfig, heldout_loss
from dit_moe.models import MODELS
from dit_moe.models.dit import DiTConfig
from dit_moe.moe import routers_of

SHORT = HeldoutConfig(draws=2, batch_size=128)


def network(name="DiT-custom/4-4E2A", learn_sigma=False):
    torch.manual_seed(0)
    shape = {"input_size": 8, "in_channels": 1, "num_classes": 10, "learn_sigma": learn_sigma}
    model = MODELS.build(DiTConfig(name=name, depth=2, width=32, heads=2, **shape))
    for parameter in model.parameters():  # what begins at zero would hide what it multiplies
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.fixture(scope="module")
def heldout():
    return DATASETS.build(DigitsConfig(), "heldout")


def measure(model, heldout, config=SHORT, objective=None):
    objective = objective or OBJECTIVES.build(FlowConfig(label_dropout=1.0), num_classes=10)
    return heldout_loss(model, objective, FIRST_STAGES.build(IdentityConfig()), heldout, config)


def test_it_is_the_same_number_each_time_and_counts_experts_layer_by_layer_beside_training(heldout):
    model = network()
    found = measure(model, heldout)
    torch.manual_seed(5)
    assert measure(model, heldout) == found
    assert all(router.stats.sums is None for router in routers_of(model))
    tokens = 2 * 450 * 4  # draws × images × patches
    assert [layer.tokens for layer in found.layers] == [tokens, tokens]
    assert found.active == pytest.approx(sum(layer.mean for layer in found.layers) / 2)
    assert 1 <= found.active <= 4
    ddpm = measure(network(learn_sigma=True), heldout, SHORT, OBJECTIVES.build(DDPMConfig(), num_classes=10))
    assert ddpm.terms["loss"] == pytest.approx(ddpm.terms["mse"] + ddpm.terms["vb"], rel=1e-6)


class Zero(torch.nn.Module):
    """Predicts 0 and keeps the labels that it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.labels = []

    def forward(self, x, t, y):
        self.labels.append(y)
        return torch.zeros_like(x)


def test_a_network_that_knows_the_answer_has_no_loss_and_one_that_predicts_0_has_that_of_the_target(heldout):
    """The velocity is eps − x0, so a network that predicts 0 has the mean of (eps − x0)²: 1 + mean x0²."""

    class Knows(Zero):
        """x_t = (1 − t)·x0 + t·eps for one x0, so that eps − x0 = (x_t − x0) / t."""

        def forward(self, x, t, y):
            return (x - constant) / (t / 1000).view(-1, 1, 1, 1)

    class OneImage:
        def __len__(self):
            return 30

        def __getitems__(self, indices):
            rows = heldout.__getitems__([0] * len(indices))
            return {**rows, "labels": torch.zeros(len(indices), dtype=torch.int64)}

    x0 = heldout.__getitems__(range(len(heldout)))["images"].float() / 127.5 - 1
    zero = Zero()
    found = measure(zero, heldout, HeldoutConfig(draws=8))
    assert torch.cat(zero.labels).max() == 9  # labels are never dropped
    assert found.loss == pytest.approx(1 + x0.square().mean().item(), rel=0.02)
    assert found.images == 450 and found.active is None and found.layers == []
    constant = x0[:1]
    assert measure(Knows(), OneImage()).loss < 1e-9


def test_two_networks_are_asked_about_the_same_noise_so_their_difference_has_far_less_spread_than_they_have(heldout):
    one, other = network(), network()
    with torch.no_grad():  # almost the same network
        for parameter in other.parameters():
            parameter.mul_(1.01)
    losses = [
        [measure(each, heldout, HeldoutConfig(draws=1, seed=seed)).loss for seed in range(4)] for each in (one, other)
    ]
    first, second = torch.tensor(losses, dtype=torch.float64)
    assert (second - first).std() < 0.1 * first.std()


def test_some_images_are_evenly_spaced_ones_and_more_than_there_are_means_all(heldout):
    asked = []

    class Noting:
        def __len__(self):
            return len(heldout)

        def __getitems__(self, indices):
            asked.append(list(indices))
            return heldout.__getitems__(indices)

    assert measure(network(), Noting(), HeldoutConfig(draws=1, images=9)).images == 9
    assert asked == [list(range(0, 450, 50))]
    assert measure(network(), Noting(), HeldoutConfig(draws=1, images=1000)).images == 450


def test_a_network_that_gives_no_numbers_is_an_error(heldout):
    model = network()
    with torch.no_grad():
        next(iter(model.blocks[0].parameters())).fill_(math.nan)
    with pytest.raises(ValueError, match="held-out loss is nan"):
        measure(model, heldout)


@pytest.mark.parametrize("wrong", [{"draws": 0}, {"batch_size": 0}, {"images": 0}, {"seed": -1}])
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        HeldoutConfig(**wrong)
