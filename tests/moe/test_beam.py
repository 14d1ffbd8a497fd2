"""BEAM against its equations, by plain loops over tokens in float64, and the gradient through its mask."""

import math

import pytest
import torch

from dit_moe.checkpoint import upgraded
from dit_moe.config import ConfigError, build
from dit_moe.moe import RoutingContext
from dit_moe.moe.routers.beam import BEAMConfig
from tests.moe.examples import EXPERTS, TOKENS, context, make, step, tokens

K = 4


def trained(**options):
    """With a mask that is not indifferent."""
    router = make("beam", **options)
    torch.nn.init.normal_(router.mask_weight, std=0.3)
    return router


def equations(router, x) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Softmax over the candidates, mask, and the mean over tokens of the mean over candidates of σ."""
    gates, masks, mean = torch.zeros(2, TOKENS, EXPERTS).double(), torch.zeros(TOKENS, EXPERTS, dtype=torch.bool), 0.0
    logits = (x.double() @ router.weight.detach().double().T).tolist()
    stays = (x.double() @ router.mask_weight.detach().double().T).tolist()
    for n, (z, s) in enumerate(zip(logits, stays, strict=True)):
        best = sorted(range(EXPERTS), key=z.__getitem__)[-K:]
        for i in best:
            sigma = 1 / (1 + math.exp(-s[i]))
            gates[0, n, i] = math.exp(z[i]) / sum(math.exp(z[j]) for j in best)
            masks[n, i] = sigma >= 0.5
            mean += sigma / K / TOKENS
    return gates[0], masks, mean


def dense(routing) -> torch.Tensor:
    gates = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64)
    return gates.index_put((routing.token_R, routing.expert_R), routing.weight_R.double())


@pytest.mark.parametrize("training", [True, False])
def test_gates_are_the_softmax_over_the_candidates_without_the_masked_ones(training):
    router, x = trained().train(training), tokens()
    gates, masks, mean = equations(router, x)
    routing = router(x, context())
    torch.testing.assert_close(dense(routing), gates * masks, atol=1e-6, rtol=1e-5)
    assert len(routing.token_R) == (TOKENS * K if training else masks.sum())
    assert 0 < masks.sum() < TOKENS * K and (masks.sum(1) == 0).any()
    if training:
        assert routing.aux["mask"].item() == pytest.approx(mean)
        assert router.stats.active.item() == pytest.approx(masks.sum().item() / TOKENS)


def test_a_gate_masked_or_not_passes_its_gradient_to_sigma_as_if_the_mask_were_sigma():
    router, x = trained(), tokens()
    gates, _, _ = equations(router, x)
    upstream = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (dense(router(x)) * upstream).sum().backward()
    sigma = (x.double() @ router.mask_weight.detach().double().T).sigmoid()
    wanted = (upstream * gates * sigma * (1 - sigma)).T @ x.double()
    torch.testing.assert_close(router.mask_weight.grad.double(), wanted, atol=1e-5, rtol=1e-4)


def test_training_starts_as_top_k_of_the_candidates():
    routing = make("beam")(tokens())
    assert torch.equal(routing.token_R.bincount(), torch.full((TOKENS,), K))
    torch.testing.assert_close(dense(routing).sum(1), torch.ones(TOKENS).double())


@pytest.mark.parametrize("size", [1e-4, 0.3, 30])
@pytest.mark.parametrize("shift", [0, 2])
def test_a_budget_moves_the_bias_until_the_target_stays_whatever_the_size_of_the_logits(size, shift):
    router, active = make("beam", target=1.5), []
    torch.nn.init.normal_(router.mask_weight, std=size)
    for seed in range(40):
        step(router, (tokens(seed, 400) + shift, RoutingContext()))
        router.eval()
        active.append(len(router(tokens(seed + 1, 400) + shift).token_R) / 400)
        router.train()
    assert sum(active[20:]) / 20 == pytest.approx(1.5, rel=0.01)  # in evaluation as in the training step that follows


@pytest.mark.parametrize(("options", "weights"), [({"budget": False, "mask_loss": 0.01}, 0.3), ({}, 0.0)])
def test_the_bias_stays_at_zero_without_a_budget_and_as_long_as_no_weight_has_moved(options, weights):
    router = make("beam", **options)
    torch.nn.init.constant_(router.mask_weight, weights)
    step(router, (tokens(), context()))
    assert router.state_numbers()["mask_bias"] == 0
    assert router.config.controlled is router.config.held is router.config.budget


@pytest.mark.parametrize(("target", "candidates", "wanted"), [(2, None, 4), (1.2, None, 3), (6, None, 8), (2, 5, 5)])
def test_there_are_twice_as_many_candidates_as_the_target_unless_a_config_says_otherwise(target, candidates, wanted):
    assert make("beam", target, candidates=candidates).candidates == wanted


def test_fewer_candidates_than_the_target_are_refused():
    with pytest.raises(ConfigError, match=r"candidates=2 must lie in \[3, 8\]"):
        BEAMConfig(candidates=2).check(8, 3)


def test_a_run_whose_budget_steered_the_coefficient_is_read_with_a_mask_that_has_no_bias():
    router, x = trained().eval(), tokens()
    former = {name: each for name, each in router.state_dict().items() if name != "mask_bias"}
    former |= {"coefficient.integral": torch.tensor(1.0), "coefficient.value": torch.tensor(2.0)}
    router.mask_bias.fill_(3.0)
    router.load_state_dict(upgraded(router, former))
    assert torch.equal(dense(router(x)) > 0, equations(router, x)[1])
    assert build(BEAMConfig, {"growth": 1.2, "damping": 20.0, "mask_loss": 1e-8}) == BEAMConfig(mask_loss=1e-8)
