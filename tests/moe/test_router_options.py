"""What the options that routers share do, and what sets top-k, top-p and DTop-p apart."""

import math
from dataclasses import replace

import pytest
import torch

from dit_moe.moe import ROUTERS, MoEConfig, MoELayer, RoutingContext
from dit_moe.moe.routers.base import DRN_EPS
from dit_moe.moe.routers.dtopp import DTopPConfig
from tests.moe.examples import EXPERTS, SAMPLES, TOKENS, WIDTH, context, make, step, tokens


def task_gradients(name, **options) -> tuple[float, float]:
    """Norms of the task's gradients of the router's weights and of the experts' that read the same tokens."""
    torch.manual_seed(0)
    layer = MoELayer(MoEConfig(experts=EXPERTS, target=1, router=ROUTERS.config_class(name)(**options)), WIDTH, 64)
    layer(tokens())[0].sub(tokens(2)).square().sum().backward()
    return layer.router.weight.grad.norm().item(), layer.experts.w_in.grad.norm().item()


@pytest.mark.parametrize("name", ["topk", "topp", "dtopp"])
@pytest.mark.parametrize("drn", [False, True])
def test_the_task_teaches_a_router_of_one_expert_unless_it_is_told_to_renormalise(name, drn):
    router, experts = task_gradients(name, drn=drn, max_experts=1)
    assert 0.1 * experts < router < 10 * experts  # seen: 0.5 without DRN, 4.4 with it
    router, experts = task_gradients(name, drn=drn, max_experts=1, renormalize=True)
    assert router < 1e-4 * experts


@pytest.mark.parametrize(
    ("target", "most", "resolved"), [(2, None, True), (1.5, 2, True), (1, None, False), (1, 1, False)]
)
def test_gates_sum_to_one_by_default_unless_a_token_has_one_expert(target, most, resolved):
    options = DTopPConfig(max_experts=most)
    assert MoEConfig(experts=EXPERTS, target=target, router=options).router.renormalize is resolved
    assert ROUTERS.build(options, WIDTH, EXPERTS, target).config.renormalize is resolved


@pytest.mark.parametrize("name", ["topk", "topp", "dtopp"])
def test_raw_gates_are_the_probabilities(name):
    router = make(name, renormalize=False)
    routing = router(tokens())
    prob = router.scores(tokens()).prob_NE
    torch.testing.assert_close(routing.weight_R, prob[routing.token_R, routing.expert_R])


def test_topk_uses_exactly_k_best_experts():
    router = make("topk", target=3)
    routing, prob = router(tokens()), router.scores(tokens()).prob_NE
    assert torch.equal(routing.token_R.bincount(), torch.full((TOKENS,), 3))
    chosen = prob[routing.token_R, routing.expert_R].sum()
    torch.testing.assert_close(chosen, prob.topk(3).values.sum())


def test_drn_is_the_standardised_softmax_of_the_paper():
    router, x = make("dtopp").double(), tokens()
    with torch.no_grad():
        router.theta.fill_(1.7)
    z = x @ router.weight.float().T
    for scale in (1.0, 1e-2):  # where the standard deviation is about ten times ε, its place matters
        std = (scale * z).std(-1, keepdim=True, correction=0)
        expected = (1.7 * scale * (z - z.mean(-1, keepdim=True)) / (std + DRN_EPS)).softmax(-1)
        torch.testing.assert_close(router.scores(scale * x).prob_NE, expected, rtol=1e-5, atol=1e-6)


def test_fixed_top_p_does_not_move_and_dtopp_does():
    fixed = make("topp", p=0.9)
    steered = make("dtopp", drn=False, controller=replace(DTopPConfig().controller, p0=0.9))
    pairs = []
    for router in (fixed, steered):
        for _ in range(2):
            pairs.append(len(router(tokens()).token_R))
            router.after_step(router.stats, router.stats)
    assert pairs[0] == pairs[1] == pairs[2] > pairs[3]  # 0.9 activates more than 2 of 8


@pytest.mark.parametrize("name", ["topk", "topp", "dtopp"])
def test_the_bias_of_loss_free_balancing_ranks_experts_evens_the_load_and_leaves_the_gates(name):
    router = make(name, bias_rate=0.02)
    preferred = router.weight.detach()[0]
    x, loads = tokens(count=400) + 2 * preferred / preferred.norm(), []
    for _ in range(60):
        step(router, (x, RoutingContext()))
        loads.append(router.load_E.clone())
    assert loads[-1].std() < 0.5 * loads[0].std()
    routing, prob = router(x), router.scores(x).prob_NE
    gates = torch.zeros(400, EXPERTS)
    gates[routing.token_R, routing.expert_R] = routing.weight_R
    chosen = prob * (gates > 0)
    torch.testing.assert_close(gates, chosen / chosen.sum(-1, keepdim=True))
    assert router.bias_E.argmin() == 0


def test_the_scores_are_the_functions_that_their_names_say():
    x = tokens()
    router = {score: make("topk", score=score) for score in ("softmax", "sigmoid", "identity", "cosine")}
    z = x @ router["softmax"].weight.T
    expected = {
        "softmax": z.exp() / z.exp().sum(-1, keepdim=True),
        "sigmoid": 1 / (1 + (-z).exp()),
        "identity": z,
        "cosine": z / x.norm(dim=-1, keepdim=True) / router["cosine"].weight.norm(dim=-1),
    }
    for score, wanted in expected.items():
        found = router[score].scores(x)
        torch.testing.assert_close(found.score_NE, wanted)
        torch.testing.assert_close(found.prob_NE.sum(-1), torch.ones(TOKENS))


@pytest.mark.parametrize(("reads", "width"), [("unmodulated", WIDTH), ("unmodulated_time", 2 * WIDTH)])
def test_a_router_may_read_the_token_before_its_modulation_and_the_time(reads, width):
    router, whole = make("topk", input=reads), context()
    read = router.scores(tokens(), whole).x_ND
    assert router.weight.shape == (EXPERTS, width)
    torch.testing.assert_close(read[:, -WIDTH:], whole.unmodulated_ND)
    if width > WIDTH:
        torch.testing.assert_close(read[TOKENS // SAMPLES, :WIDTH], whole.time_BD[1])


@pytest.mark.parametrize("p", [0.4, 0.9])
def test_raw_top_p_is_the_published_rule_of_experts_before_which_less_than_p_was_seen(p):
    """Huang et al. with 0.4; XMoE with 0.9, which keeps an expert while (cumsum − own) < p."""
    router, x = make("topp", p=p, renormalize=False), tokens()
    routing, expected = router(x), {}
    for n, row in enumerate(router.scores(x).logits_NE.double().tolist()):
        total, seen = sum(math.exp(z) for z in row), 0.0
        for e in sorted(range(EXPERTS), key=lambda e: -row[e]):
            if seen < p:
                expected[n, e] = math.exp(row[e]) / total
            seen += math.exp(row[e]) / total
    pairs = zip(routing.token_R.tolist(), routing.expert_R.tolist(), strict=True)
    assert dict(zip(pairs, routing.weight_R.tolist(), strict=True)) == pytest.approx(expected, rel=1e-5)
