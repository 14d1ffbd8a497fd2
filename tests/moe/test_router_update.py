"""Counting, controlling and measuring a whole model's routers."""

import copy

import pytest
import torch
from torch import nn

from dit_moe.moe import collapsed, counted_active, measure_active, notes, routers_of, update_routers
from dit_moe.moe.router_stats import RouterStats
from dit_moe.moe.routers.dtopp import DTopPConfig
from dit_moe.moe.routers.topk import TopKConfig
from tests.moe.stack import batch, stack, thresholds


def test_report_has_the_measured_numbers_of_each_layer():
    model = stack()
    masks = []
    for router in routers_of(model):
        router.register_forward_hook(lambda _, __, routing: masks.append(routing))
    model(batch())
    report = update_routers(model)
    for i, routing in enumerate(masks):
        per_token = routing.token_R.bincount(minlength=256).double()
        assert report["layers"]["active"][i] == pytest.approx(per_token.mean().item())
        assert report["layers"]["active_std"][i] == pytest.approx(per_token.std(correction=0).item())
    assert report["active"] == pytest.approx(sum(report["layers"]["active"]) / 3)
    assert report["layers"]["theta"] == [1.0] * 3


def test_a_dense_model_and_one_without_threshold_report_what_they_have():
    assert update_routers(nn.Linear(2, 2)) == {}
    model = stack(TopKConfig())
    model(batch())
    report = update_routers(model)
    assert report["active"] == 2.0 and report["p"] is None and "p" not in report["layers"]


def test_a_layer_that_sends_nearly_all_tokens_to_one_expert_is_named():
    model = stack()
    with torch.no_grad():
        for layer, first in enumerate((0.0, 9.0, 0.0)):
            router = routers_of(model)[layer]
            logits = torch.zeros(router.experts)
            logits[0] = first
            plain = router.logits
            router.logits = lambda *args, plain=plain, more=logits: plain(*args) + more
            router.theta.fill_(3.0 if first else 1.0)
        model(batch())
    said = collapsed(model, update_routers(model))
    assert said is not None and "in MoE layer 1 (" in said and "balance_loss=1e-2" in said
    model = stack()
    model(batch())
    assert collapsed(model, update_routers(model)) is None and collapsed(nn.Linear(2, 2), {}) is None


def test_micro_batches_add_up_to_the_whole_batch():
    whole, parts = stack(), stack()
    x = batch()
    whole(x)
    for part in x.split(1):
        parts(part)
    one, many = update_routers(whole), update_routers(parts)
    assert one["active"] == many["active"] and thresholds(whole) == thresholds(parts)
    for name, values in one["layers"].items():
        assert many["layers"][name] == pytest.approx(values, rel=1e-6)  # fp32 GEMMs of another shape


def test_a_forward_pass_that_runs_twice_changes_nothing():
    once, twice = stack(), stack()
    once(batch())
    twice(batch())
    twice(batch())
    assert update_routers(once) == update_routers(twice)


@pytest.mark.parametrize("fed", [True, False], ids=["a batch of no tokens", "no forward pass"])
def test_a_rank_without_tokens_follows_the_others_and_a_step_without_any_moves_nothing(fed):
    idle, busy = stack(), stack()
    busy(batch())
    sums = torch.stack([router.stats.sums for router in routers_of(busy)])
    if fed:
        idle(batch(tokens=0))
    update_routers(idle, reduce=lambda own: own + sums)
    update_routers(busy)
    assert thresholds(idle) == thresholds(busy) and thresholds(idle)[0] != thresholds(stack())[0]
    before = copy.deepcopy(idle.state_dict())
    if fed:
        idle(batch(tokens=0))
    report = update_routers(idle)
    assert all(torch.equal(value, before[name]) for name, value in idle.state_dict().items())
    assert report["p"] == thresholds(idle)[0]


def test_the_active_experts_counted_so_far_are_those_of_the_report():
    model = stack()
    model(batch())
    so_far = counted_active(model).item()
    assert so_far == pytest.approx(update_routers(model)["active"]) and counted_active(nn.Linear(2, 2)) is None


def test_a_steered_router_whose_target_is_one_expert_says_what_that_means():
    assert notes(stack()) == notes(stack(TopKConfig(), target=1)) == notes(nn.Linear(2, 2)) == []
    (note,) = notes(stack(target=1))
    assert note.startswith("model.moe.target=1: the threshold falls until every token uses one expert; for dynamic")


@pytest.mark.parametrize("layerwise", [False, True])
def test_one_threshold_for_all_layers_or_one_for_each_reaches_the_target(layerwise):
    model = stack(DTopPConfig(layerwise=layerwise), target=2.5)
    for step in range(40):
        model(batch(step))
        report = update_routers(model)
    assert len(set(thresholds(model))) == (3 if layerwise else 1)
    wanted = report["layers"]["active"] if layerwise else [report["active"]]
    assert wanted == pytest.approx([2.5] * len(wanted), rel=0.05)  # one batch of 256 tokens


def test_balance_loss_uses_the_load_of_the_step_before():
    model = stack(layers=1)
    router = routers_of(model)[0]
    model(batch())
    counted = router.stats.load_E.clone()
    update_routers(model)
    torch.testing.assert_close(router.load_E, counted.float())
    prob = router.scores(batch(1).flatten(0, 1)).prob_NE
    balance = router(batch(1).flatten(0, 1)).aux["balance"]
    torch.testing.assert_close(balance, 8 * (counted.float() * prob.mean(0)).sum())


def test_balance_is_one_for_an_even_load_and_experts_for_a_collapsed_one():
    even, collapsed = torch.eye(4), torch.zeros(8, 4)
    collapsed[:, 2] = 1
    for prob, expected in ((even, 1.0), (collapsed, 4.0)):
        counters = RouterStats(4)
        counters.add(prob.bool(), prob)
        assert counters.balance.item() == pytest.approx(expected)


def test_measured_active_experts_are_pairs_per_token_in_any_mode():
    model = stack().eval()
    seen = []
    for router in routers_of(model):
        router.register_forward_hook(lambda _, args, routing: seen.append((len(routing.token_R), len(args[0]))))
    with measure_active(model) as active:
        assert active.mean is None
        model(batch())
        model(batch(1, tokens=64))
    assert active.mean == pytest.approx(sum(pairs for pairs, _ in seen) / sum(tokens for _, tokens in seen))
    assert all(router.stats.sums is None for router in routers_of(model))
