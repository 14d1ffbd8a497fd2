"""Forced routing."""

import pytest
import torch

from dit_moe.moe import RoutingContext
from tests.moe.examples import WIDTH, make, tokens


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        (2, [{0, 1}, {2, 3}, {0, 1}, {2, 3}]),
        (1, [{0}, {1}, {2}, {3}]),
        (1.5, [{0}, {1, 2}, {3}, {0, 1}]),
        (4, [{0, 1, 2, 3}] * 4),
    ],
)
def test_a_token_has_the_next_experts_round_by_its_place_in_the_sample(target, wanted):
    router = make("forced", target, experts=4)
    assert list(router.parameters()) == []
    routing = router(torch.randn(8, WIDTH), RoutingContext(samples=2))
    pairs = zip(routing.token_R.tolist(), routing.expert_R.tolist(), strict=True)
    gates = dict(zip(pairs, routing.weight_R.tolist(), strict=True))
    assert gates == pytest.approx({(n, i): 1 / len(wanted[n % 4]) for n in range(8) for i in wanted[n % 4]})


@pytest.mark.parametrize("target", [1.1, 4 / 3, 1.7, 3.9])
def test_the_mean_is_the_target_and_the_load_is_even(target):
    routing = make("forced", target, experts=4)(tokens(count=1200))
    assert len(routing.token_R) == round(1200 * target) and routing.counts_E.max() - routing.counts_E.min() <= 1
