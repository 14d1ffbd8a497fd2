"""The contract of every registered router; a new one is tested unasked."""

import copy
from dataclasses import replace

import pytest
import torch

from dit_moe.config import ConfigError
from dit_moe.moe import ROUTERS, MoEConfig, MoELayer
from tests.moe.examples import (
    EXPERTS,
    SAMPLES,
    TOKENS,
    WIDTH,
    after_another,
    backward,
    context,
    make,
    mask_of,
    of_sample,
    step,
    tokens,
)

# The registry's own routers, not those that another test may have added.
NAMES = ROUTERS.names()


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


@pytest.mark.parametrize("name", [name for name in NAMES if make(name).config.sees != "batch"])
def test_a_router_looks_no_further_in_training_than_its_config_says(name):
    """Tokens that it does not look at may be anything."""
    router, x, whole = make(name), tokens(), context()
    sees, size = router.config.sees, TOKENS // SAMPLES
    kept = {"token": 1, "sample": size}[sees]
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


@pytest.mark.parametrize("name", NAMES)
def test_the_state_of_a_router_is_exact_over_accumulation_and_recompute_and_is_all_that_it_keeps(name):
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
