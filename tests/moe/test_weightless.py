"""AdaMoE and MoE++: their budget, choice, gates, added output and losses, against plain loops in float64."""

import math
from dataclasses import replace

import pytest
import torch

from dit_moe.config import ConfigError
from dit_moe.moe import ROUTERS, RoutingContext
from dit_moe.moe.routers.adamoe import AdaMoEConfig
from dit_moe.moe.routers.moepp import MoEPPConfig

WIDTH, EXPERTS, TOKENS = 6, 4, 30


def case(config, target=2):
    torch.manual_seed(0)
    router = ROUTERS.build(replace(config, init_std=0.7), WIDTH, EXPERTS, target)
    return router, torch.randn(TOKENS, WIDTH)


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(z) for z in row)
    return [math.exp(z) / total for z in row]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def logits(router, x, earlier=None) -> list[list[float]]:
    """W·x, and with the scores of the layer before W_g times those."""
    rows = [[dot(token, row) for row in router.weight.tolist()] for token in x.tolist()]
    if earlier is None:
        return rows
    more = [[dot(scores, row) for row in router.residual.tolist()] for scores in earlier.tolist()]
    return [[a + b for a, b in zip(*both, strict=True)] for both in zip(rows, more, strict=True)]


def best(prob: list[float], k: int) -> list[int]:
    return sorted(range(len(prob)), key=lambda i: -prob[i])[:k]


def pairs_of(routing) -> dict[tuple[int, int], float]:
    pairs = zip(routing.token_R.tolist(), routing.expert_R.tolist(), strict=True)
    return dict(zip(pairs, routing.weight_R.tolist(), strict=True))


def balance(loads: list[float], probs: list[list[float]]) -> float:
    means = [sum(column) / len(probs) for column in zip(*probs, strict=True)]
    return len(loads) * dot(loads, means)


@pytest.mark.parametrize(
    ("config", "experts", "target", "k", "weightless"),
    [
        (AdaMoEConfig(), 8, 2, 4, 8),
        (AdaMoEConfig(), 8, 1.5, 3, 8),
        (AdaMoEConfig(), 8, 8, 16, 8),
        (AdaMoEConfig(null_experts=4), 8, 2, 3, 4),
        (AdaMoEConfig(k=3, null_experts=16), 8, 1, 3, 16),
        (AdaMoEConfig(k=5), 8, 2, 5, 12),
        (MoEPPConfig(), 8, 2, 3, 3),  # the published numbers of zero, copy and constant experts
        (MoEPPConfig(), 16, 4, 5, 3),
        (MoEPPConfig(), 8, 1, 2, 6),
        (MoEPPConfig(tau=1), 8, 2, 3, 4),
        (MoEPPConfig(constant_experts=0, zero_experts=0, copy_experts=0), 8, 2, 2, 0),
    ],
)
def test_k_and_the_experts_without_weights_make_the_target_at_balance(config, experts, target, k, weightless):
    resolved = ROUTERS.build(config, WIDTH, experts, target).config
    assert (resolved.k, resolved.weightless) == (k, weightless)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdaMoEConfig(k=2, null_experts=8), r"^k=2 of 16, of which 8 have weights, keeps 1 active and not target=2; "),
        (MoEPPConfig(k=20, constant_experts=1), r"^k=20 must be from 1 to 11, of which 8 have weights"),
    ],
)
def test_options_that_make_another_number_of_experts_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        config.check(8, 2)


def test_adamoe_chooses_among_experts_and_null_experts_and_balances_them_by_their_mean_load():
    router, x = case(AdaMoEConfig())
    probs, expected, nulls, real = [softmax(row) for row in logits(router, x)], {}, 0, [0] * EXPERTS
    for n, prob in enumerate(probs):
        active = [e for e in best(prob, 4) if e < EXPERTS]
        nulls += 4 - len(active)
        for e in active:
            expected[n, e] = prob[e] / sum(prob[i] for i in active)
            real[e] += 1
    routing = router(x)
    assert pairs_of(routing) == pytest.approx(expected, rel=1e-5)
    assert len(expected) < 4 * TOKENS  # nulls were chosen
    assert routing.aux["balance"].item() == pytest.approx(balance([1 / 8] * 8, probs), rel=1e-5)
    for _ in range(2):
        router.after_step(router.stats, router.stats)
        loads = [each / (4 * TOKENS) for each in real] + [nulls / (4 * TOKENS) / 4] * 4
        assert router(x).aux["balance"].item() == pytest.approx(balance(loads, probs), rel=1e-5)


def test_a_token_whose_choices_are_all_null_gets_no_expert():
    router, x = case(AdaMoEConfig())
    with torch.no_grad():
        router.weight[:EXPERTS] = -x[0]
        router.weight[EXPERTS:] = x[0]
    assert 0 not in router(x).token_R


def test_moepp_adds_what_zero_copy_and_constant_experts_give_and_remembers_the_scores_of_the_layer_before():
    router, x = case(MoEPPConfig(zero_experts=1, copy_experts=1, constant_experts=2, k=3, tau=1), target=1.5)
    earlier = torch.randn(TOKENS, 8)
    routing = router(x, RoutingContext(earlier_NE=earlier))
    z = logits(router, x, earlier)
    probs, expected, added, chosen = [softmax(row) for row in z], {}, [], [0] * 8
    for n, (token, prob) in enumerate(zip(x.tolist(), probs, strict=True)):
        active, out = best(prob, 3), [0.0] * WIDTH
        total = sum(prob[i] for i in active if i != EXPERTS)  # the zero expert's gate is 0
        for i in active:
            chosen[i] += 1
            if i < EXPERTS:
                expected[n, i] = prob[i] / total
            elif i == EXPERTS + 1:
                out = [a + prob[i] / total * b for a, b in zip(out, token, strict=True)]
            elif i > EXPERTS + 1:
                c = i - EXPERTS - 2
                of_token, of_constant = softmax([dot(token, row) for row in router.mix[2 * c : 2 * c + 2].tolist()])
                mixed = zip(token, router.constant[c].tolist(), strict=True)
                mixed = [of_token * a + of_constant * b for a, b in mixed]
                out = [a + prob[i] / total * b for a, b in zip(out, mixed, strict=True)]
        added.append(out)
    assert min(chosen) > 0
    assert pairs_of(routing) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(routing.added_ND, torch.tensor(added), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(routing.handed_on_NE, torch.tensor(z), atol=1e-5, rtol=1e-4)


def test_moepp_weights_the_load_of_experts_without_weights_by_tau():
    router, x = case(MoEPPConfig(constant_experts=1, tau=0.5, k=3), target=EXPERTS * 3 / (EXPERTS + 3 / 0.5))
    probs, chosen = [softmax(row) for row in logits(router, x)], [0.0] * 7
    for prob in probs:
        for i in best(prob, 3):
            chosen[i] += (1 if i < EXPERTS else 0.5) / (3 * TOKENS)
    router(x)
    router.after_step(router.stats, router.stats)
    assert router(x).aux["balance"].item() == pytest.approx(balance(chosen, probs), rel=1e-5)
