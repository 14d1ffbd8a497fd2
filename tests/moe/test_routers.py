"""The contract of every registered router; a new one is tested unasked."""

import copy
from dataclasses import replace

import pytest
import torch

from dit_moe.moe import ROUTERS, MoEConfig, MoELayer, Router
from dit_moe.moe.routers.base import DRN_EPS, INIT_STD
from dit_moe.moe.routers.dtopp import DTopPConfig

WIDTH, EXPERTS, TOKENS = 16, 8, 40
# The registry's own routers, not those that another test may have added.
NAMES = ROUTERS.names()


def make(name: str, target: float = 2, experts: int = EXPERTS, **options) -> Router:
    torch.manual_seed(0)
    """With logits of unit variance, as after some training."""
    router = ROUTERS.build(ROUTERS.config_class(name)(**options), WIDTH, experts, target)
    with torch.no_grad():
        router.weight.mul_(WIDTH**-0.5 / INIT_STD)
    return router


def tokens(seed: int = 1, count: int = TOKENS) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_every_token_gets_an_expert_and_renormalised_gates_sum_to_one(name):
    routing = make(name)(tokens())
    gates = torch.zeros(TOKENS).index_add(0, routing.token_R, routing.weight_R)
    assert routing.token_R.unique().numel() == TOKENS
    torch.testing.assert_close(gates, torch.ones(TOKENS))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_router_selects_is_what_it_routes(name):
    router = make(name)
    prob = router.probabilities(tokens())[1].detach()
    routing = router(tokens())
    mask = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
    mask[routing.token_R, routing.expert_R] = True
    assert torch.equal(router.select(prob), mask)
    assert torch.equal(router.choose(prob)[0], mask)


@pytest.mark.parametrize("name", NAMES)
def test_raw_gates_are_the_probabilities(name):
    router = make(name, renormalize=False)
    routing = router(tokens())
    prob = router.probabilities(tokens())[1]
    torch.testing.assert_close(routing.weight_R, prob[routing.token_R, routing.expert_R])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("drn", [False, True])
def test_routing_of_a_token_depends_on_it_alone(name, drn):
    router, x = make(name, drn=drn).eval(), tokens()
    together = router(x)
    for i in range(0, TOKENS, 7):
        alone = router(x[i : i + 1])
        mine = together.token_R == i
        assert together.expert_R[mine].tolist() == alone.expert_R.tolist()
        torch.testing.assert_close(together.weight_R[mine], alone.weight_R, atol=1e-6, rtol=1e-5)  # other GEMM shape


@pytest.mark.parametrize("name", NAMES)
def test_router_computes_in_fp32_under_autocast(name):
    router, x = make(name), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x)
    assert routing.weight_R.dtype == torch.float32
    torch.testing.assert_close(routing.weight_R, router(x).weight_R, atol=0, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_a_router_gets_a_finite_gradient(name):
    router = make(name, drn=True)
    routing = router(tokens())
    loss = (routing.weight_R * torch.arange(len(routing.weight_R))).sum() + sum(routing.aux.values())
    loss.backward()
    for key, parameter in router.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_term_has_a_coefficient_and_none_appears_in_evaluation(name):
    router = make(name)
    assert set(router(tokens()).aux) <= set(router.loss_weights())
    assert router.eval()(tokens()).aux == {}


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_neither_counts_nor_changes_any_state(name):
    router = make(name).eval()
    before = {key: value.clone() for key, value in router.state_dict().items()}
    router(tokens())
    assert router.stats.sums is None
    assert all(torch.equal(value, before[key]) for key, value in router.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("drn", [False, True])
def test_zero_tokens_route_to_zero_pairs_and_change_nothing(name, drn):
    router = make(name, drn=drn)
    before = copy.deepcopy(router.state_dict())
    routing = router(tokens(count=0))
    assert len(routing.token_R) == 0 and routing.counts_E.tolist() == [0] * EXPERTS
    assert all(term == 0 for term in routing.aux.values())
    router.after_step(router.stats, router.stats)
    assert all(torch.equal(value, before[key]) for key, value in router.state_dict().items())


def task_gradients(name, **options) -> tuple[float, float]:
    """Norms of the task's gradients of the router's weights and of the experts' that read the same tokens."""
    torch.manual_seed(0)
    layer = MoELayer(MoEConfig(experts=EXPERTS, target=1, router=ROUTERS.config_class(name)(**options)), WIDTH, 64)
    layer(tokens())[0].sub(tokens(2)).square().sum().backward()
    return layer.router.weight.grad.norm().item(), layer.experts.w_in.grad.norm().item()


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
def test_a_token_whose_logits_are_all_equal_gets_a_finite_gradient(name):
    router, x = make(name, drn=True), tokens().index_fill(0, torch.tensor([3]), 0.0).requires_grad_()
    routing = router(x)
    (routing.weight_R.square().sum() + sum(routing.aux.values())).backward()
    assert x.grad.isfinite().all() and router.weight.grad.isfinite().all()


def test_topk_uses_exactly_k_best_experts():
    router = make("topk", target=3)
    routing, prob = router(tokens()), router.probabilities(tokens())[1]
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
        torch.testing.assert_close(router.probabilities(scale * x)[1], expected, rtol=1e-5, atol=1e-6)


def test_fixed_top_p_does_not_move_and_dtopp_does():
    fixed = make("topp", p=0.9)
    steered = make("dtopp", drn=False, controller=replace(DTopPConfig().controller, p0=0.9))
    pairs = []
    for router in (fixed, steered):
        for _ in range(2):
            pairs.append(len(router(tokens()).token_R))
            router.after_step(router.stats, router.stats)
    assert pairs[0] == pairs[1] == pairs[2] > pairs[3]  # 0.9 activates more than 2 of 8
