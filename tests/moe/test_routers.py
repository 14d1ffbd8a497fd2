"""The contract of every registered router; a new one is tested unasked."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from dit_moe.config import ConfigError
from dit_moe.moe import ROUTERS, MoEConfig, MoELayer, Router, RoutingContext
from dit_moe.moe.routers.base import DRN_EPS
from dit_moe.moe.routers.dtopp import DTopPConfig

WIDTH, EXPERTS, SAMPLES, TOKENS = 16, 8, 5, 40
NULL = 3
# The registry's own routers, not those that another test may have added.
NAMES = ROUTERS.names()


def make(name: str, target: float = 2, experts: int = EXPERTS, **options) -> Router:
    """With logits of unit variance, as after some training, and without options that mean nothing to it."""
    torch.manual_seed(0)
    config_class = ROUTERS.config_class(name)
    options = {"init_std": WIDTH**-0.5} | options
    config = config_class(**{key: value for key, value in options.items() if key not in config_class.UNUSED})
    return ROUTERS.build(config, WIDTH, experts, target)


def tokens(seed: int = 1, count: int = TOKENS) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def context(samples: int = SAMPLES, count: int = TOKENS) -> RoutingContext:
    """What a DiT tells its routers; the second sample is without a class."""
    labels = torch.arange(samples) % 3
    labels[1:2] = NULL
    unmodulated, time = tokens(7, count), tokens(8, samples)
    return RoutingContext(samples=samples, labels_B=labels, null_label=NULL, time_BD=time, unmodulated_ND=unmodulated)


def of_sample(whole: RoutingContext, b: int) -> RoutingContext:
    """The context of one of its samples alone."""
    own = slice(b * TOKENS // SAMPLES, (b + 1) * TOKENS // SAMPLES)
    return replace(
        whole,
        samples=1,
        labels_B=whole.labels_B[b : b + 1],
        time_BD=whole.time_BD[b : b + 1],
        unmodulated_ND=whole.unmodulated_ND[own],
        earlier_NE=None if whole.earlier_NE is None else whole.earlier_NE[own],
    )


def mask_of(routing, count: int = TOKENS, experts: int = EXPERTS) -> torch.Tensor:
    mask = torch.zeros(count, experts, dtype=torch.bool)
    mask[routing.token_R, routing.expert_R] = True
    return mask


def backward(loss: torch.Tensor) -> None:
    """Nothing if no parameter takes part, as with a router that learns nothing."""
    if loss.requires_grad:
        loss.backward()


def after_another(router: Router, whole: RoutingContext) -> RoutingContext:
    """Of the same tokens in a second layer, with what the first one hands on."""
    return replace(whole, earlier_NE=router(tokens(2), whole).handed_on_NE)


def skips(name: str) -> bool:
    return ROUTERS.config_class(name).MAY_SKIP


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_every_token_gets_an_expert_unless_the_router_may_skip_it(name, training):
    routing = make(name).train(training)(tokens(), context())
    assert routing.counts_E.sum() == len(routing.token_R) and (routing.expert_R.diff() >= 0).all()
    assert skips(name) or routing.token_R.unique().numel() == TOKENS


@pytest.mark.parametrize("name", NAMES)
def test_renormalised_gates_of_a_token_sum_to_the_scale(name):
    router = make(name)
    routing = router(tokens(), context())
    sums = torch.zeros(TOKENS).index_add(0, routing.token_R, routing.weight_R)[routing.token_R.unique()]
    if router.config.renormalize and routing.added_ND is not None:  # experts without weights have the rest
        assert (sums <= router.config.gate_scale + 1e-6).all()
    elif router.config.renormalize:
        torch.testing.assert_close(sums, torch.full_like(sums, router.config.gate_scale))
    else:
        assert sums.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("drn", [False, True])
def test_in_evaluation_a_sample_is_routed_as_if_it_were_alone(name, drn):
    router, x = make(name, drn=drn).eval(), tokens()
    whole = after_another(router, context())
    together = router(x, whole)
    size = TOKENS // SAMPLES
    for b in range(SAMPLES):
        alone = router(x[b * size : (b + 1) * size], of_sample(whole, b))
        mine = together.token_R // size == b
        assert torch.equal(mask_of(together)[b * size : (b + 1) * size], mask_of(alone, size))
        torch.testing.assert_close(together.weight_R[mine], alone.weight_R, atol=1e-6, rtol=1e-5)  # other GEMM shape
        if together.added_ND is not None:
            torch.testing.assert_close(together.added_ND[b * size : (b + 1) * size], alone.added_ND)


@pytest.mark.parametrize("name", NAMES)
def test_a_router_looks_no_further_in_training_than_its_config_says(name):
    """Tokens that it does not look at may be anything."""
    router, x, whole = make(name), tokens(), context()
    sees, size = router.config.sees, TOKENS // SAMPLES
    kept = {"token": 1, "sample": size, "batch": TOKENS}[sees]
    other = torch.cat([x[:kept], tokens(99)[kept:]])
    changed = replace(whole, unmodulated_ND=torch.cat([whole.unmodulated_ND[:kept], tokens(98)[kept:]]))
    assert torch.equal(mask_of(router(x, whole))[:kept], mask_of(router(other, changed))[:kept])


@pytest.mark.parametrize("name", NAMES)
def test_only_routers_that_look_at_a_token_alone_serve_text(name):
    config = make(name).config
    if config.sees == "token" and not config.NEEDS_LABELS:
        config.check_text()
    else:
        with pytest.raises(ConfigError, match="choose dtopp"):
            config.check_text()


@pytest.mark.parametrize("name", NAMES)
def test_router_computes_in_fp32_under_autocast(name):
    router, x = make(name), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x, context())
    assert routing.weight_R.dtype == torch.float32
    torch.testing.assert_close(routing.weight_R, router(x, context()).weight_R, atol=0, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_a_router_gets_a_finite_gradient(name):
    router = make(name, drn=True)
    routing = router(tokens(), after_another(router, context()))
    loss = (routing.weight_R * torch.arange(len(routing.weight_R))).sum() + sum(routing.aux.values())
    if routing.added_ND is not None:
        loss = loss + (routing.added_ND * tokens(3)).sum()
    backward(loss)
    for key, parameter in router.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", NAMES)
def test_both_engines_give_the_same_outputs_and_gradients_under_every_router(name):
    results = []
    for implementation in ("grouped", "reference"):
        torch.manual_seed(0)
        options = ROUTERS.config_class(name)(init_std=WIDTH**-0.5)
        config = MoEConfig(experts=EXPERTS, target=2, router=options, implementation=implementation)
        layer = MoELayer(config, WIDTH, 64)
        x = tokens().view(SAMPLES, -1, WIDTH).requires_grad_()
        out, routing = layer(x, context(), None, tokens(7).view_as(x))
        (out.square().sum() + sum(routing.aux.values())).backward()
        results.append([out, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    for grouped, reference in zip(*results, strict=True):
        torch.testing.assert_close(grouped, reference, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"drn": True}])
def test_the_size_that_a_config_states_is_that_of_the_router(name, options):
    router = make(name, **options)
    assert sum(router.config.size(EXPERTS, WIDTH)) == sum(p.numel() for p in router.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_term_has_a_coefficient_and_none_appears_in_evaluation(name):
    router = make(name)
    assert set(router(tokens(), context()).aux) <= set(router.loss_weights())
    assert router.eval()(tokens(), context()).aux == {}


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_neither_counts_nor_changes_any_state(name):
    router = make(name).eval()
    before = {key: value.clone() for key, value in router.state_dict().items()}
    router(tokens(), context())
    assert router.stats.sums is None
    assert all(torch.equal(value, before[key]) for key, value in router.state_dict().items())


def step(router: Router, *batches: tuple[torch.Tensor, RoutingContext]) -> None:
    for batch in batches:
        router(*batch)
    router.after_step(router.stats, router.stats)
    router.stats.reset()


@pytest.mark.parametrize("name", NAMES)
def test_the_state_of_a_router_is_exact_under_accumulation_and_recompute_and_is_all_that_it_keeps(name):
    whole, parts, twice = make(name), make(name), make(name)
    for seed in range(3):
        x, size = tokens(seed), TOKENS // SAMPLES
        step(whole, (x, context()))
        step(twice, (x, context()), (x, context()))
        step(parts, *((x[b * size : (b + 1) * size], of_sample(context(), b)) for b in range(SAMPLES)))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, twice.state_dict()[key]), key
        if whole.config.sees != "batch":
            torch.testing.assert_close(value, parts.state_dict()[key], msg=key)
    resumed = make(name)
    resumed.load_state_dict(whole.state_dict())
    step(whole, (tokens(9), context()))
    step(resumed, (tokens(9), context()))
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("drn", [False, True])
def test_zero_tokens_route_to_zero_pairs_and_change_nothing(name, drn):
    router = make(name, drn=drn)
    before = copy.deepcopy(router.state_dict())
    routing = router(tokens(count=0), context(0, 0))
    assert len(routing.token_R) == 0 and routing.counts_E.tolist() == [0] * EXPERTS
    assert all(term == 0 for term in routing.aux.values())
    router.after_step(router.stats, router.stats)
    assert all(torch.equal(value, before[key]) for key, value in router.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("experts", "target"), [(1, 1), (4, 4), (2, 1)])
def test_one_expert_and_all_experts_are_routed_and_learned(name, training, experts, target):
    router = make(name, target=target, experts=experts).train(training)
    routing = router(tokens(), context())
    assert routing.weight_R.isfinite().all() and len(routing.token_R) <= TOKENS * experts
    backward(routing.weight_R.square().sum() + sum(routing.aux.values()))
    assert all(p.grad is None or p.grad.isfinite().all() for p in router.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("drn", [False, True])
def test_tokens_whose_scores_are_all_equal_are_routed_with_finite_gradients(name, training, drn):
    router, x = make(name, drn=drn).train(training), torch.zeros(TOKENS, WIDTH, requires_grad=True)
    routing = router(x, replace(context(), unmodulated_ND=torch.zeros(TOKENS, WIDTH)))
    assert routing.weight_R.isfinite().all()
    (routing.weight_R.square().sum() + sum(routing.aux.values()) + 0 * x.sum()).backward()
    assert x.grad.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in router.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_a_token_that_is_not_finite_makes_the_output_of_its_layer_not_finite(name, training):
    """So that the training stops before the update, and a sample is not silently wrong."""
    torch.manual_seed(0)
    config = MoEConfig(experts=EXPERTS, target=2, router=ROUTERS.config_class(name)(init_std=WIDTH**-0.5))
    layer, x = MoELayer(config, WIDTH, 64).train(training), tokens().view(SAMPLES, -1, WIDTH).clone()
    x[0, 3] = torch.nan
    out = layer(x, context(), None, x)[0]
    assert not out[0, 3].isfinite().any()
    if not training:
        assert out[1:].isfinite().all()


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
