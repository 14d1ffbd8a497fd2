"""Thresholds solved for a wanted number of active experts, and a network used with another compute budget."""

import copy
from dataclasses import dataclass

import pytest
import torch

from dit_moe.config import ConfigError
from dit_moe.moe import (
    MoEConfig,
    calibrate,
    controlled_routers,
    measure_active,
    measure_layers,
    needs_calibration,
    routers_of,
    update_routers,
)
from dit_moe.moe.compute_budget import (
    ComputeBudget,
    ComputeBudgetConfig,
    part_of,
    solve_budget,
    store_in_weights,
    threshold_histograms,
    thresholds,
)
from dit_moe.moe.routers.base import RouterConfig
from dit_moe.moe.routers.dtopp import ControllerConfig, DTopPConfig
from dit_moe.moe.routers.topk import TopKConfig
from dit_moe.moe.routers.topp import TopPConfig
from dit_moe.moe.routing import threshold_u
from tests.moe.stack import batch, stack

# ------------------------------------------------------------------------------------ calibration, before training


def measured(model, x) -> tuple[float, list[float]]:
    """Mean active experts over all layers, and by layer."""
    model(x)
    report = update_routers(model)
    return report["active"], report["layers"]["active"]


def with_theta(theta, **options):
    model = stack(**options)
    with torch.no_grad():
        for router in routers_of(model):
            router.theta.fill_(theta)
    return model


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("target", [None, 1.0, 1.5, 7.5, 8.0])
def test_solved_thresholds_meet_the_target_on_the_same_tokens(layerwise, target):
    model, x = stack(DTopPConfig(layerwise=layerwise)), batch()
    solved = calibrate(model, lambda: model(x), target)
    assert solved == pytest.approx(thresholds(model)) and (layerwise or len(set(solved)) == 1)
    wanted = target or 2.0
    mean, layers = measured(model, x)
    assert mean == pytest.approx(wanted, rel=0.01)  # counts are whole: 256 tokens · 3 layers
    if layerwise:
        assert layers == pytest.approx([wanted] * 3, rel=0.01)


@pytest.mark.parametrize(
    ("model", "target", "rel"),
    [
        (with_theta(5.0, experts=64, target=8.0), 24.0, 0.02),
        (with_theta(30.0), 4.0, 0.01),  # p above 1 − 1e-12
        (stack(DTopPConfig(min_experts=2, max_experts=4), target=3.0), None, 0.01),
    ],
    ids=["a sharp router", "a tail below what p can tell from 1", "limits of experts per token"],
)
def test_thresholds_are_solved_for(model, target, rel):
    p = calibrate(model, lambda: model(batch()), target)[0]
    assert measured(model, batch())[0] == pytest.approx(target or 3.0, rel=rel)
    assert target != 4.0 or p > 1 - 1e-12


def test_the_solution_does_not_depend_on_how_the_tokens_are_cut_over_micro_batches_and_ranks():
    mine, others = batch(0), 3 * batch(1)
    whole, parts, ranks = stack(), stack(), stack()
    calibrate(whole, lambda: [whole(mine), whole(others)])
    calibrate(parts, lambda: [parts(part) for x in (mine, others) for part in x.split(1)])

    def reduce(counts):  # adds what another rank would send
        with threshold_histograms(controlled_routers(ranks), 1) as histograms:
            ranks(others)
        return counts + histograms[0]

    calibrate(ranks, lambda: ranks(mine), reduce=reduce)
    for other in (parts, ranks):
        assert thresholds(other) == pytest.approx(thresholds(whole), abs=1e-6)  # fp32 GEMMs of another shape


def test_a_solution_outside_the_bounds_of_p_stops_at_the_bound():
    model, x = stack(DTopPConfig(controller=ControllerConfig(p_min=0.9))), batch()
    assert calibrate(model, lambda: model(x), 1.5) == pytest.approx([0.9] * 3)


def test_calibration_counts_nothing_and_keeps_the_training_mode():
    model = stack()
    calibrate(model, lambda: model(batch()))
    assert all(router.stats.sums is None and router.training for router in routers_of(model))


def test_a_model_without_threshold_is_left_alone():
    model = stack(TopKConfig())
    before = copy.deepcopy(model.state_dict())
    assert calibrate(model, lambda: model(batch())) == []
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_given_p0_is_used_and_only_an_open_one_is_solved():
    given = stack(DTopPConfig(controller=ControllerConfig(p0=0.4)))
    assert [needs_calibration(model) for model in (stack(), given, stack(TopKConfig()))] == [True, False, False]
    assert thresholds(given) == pytest.approx([0.4] * 3)


# ------------------------------------------------------------------------------------ another budget, after training

TIMES = (1.0, 0.7, 0.4, 0.1)


def budget_of(model, p_PL) -> ComputeBudget:
    return ComputeBudget(model, [[threshold_u(p) for p in p_L] for p_L in p_PL])


def walk(model, budget, times=TIMES):
    """A way from noise to data whose tokens change on it: they grow, and routing sharpens."""
    for time in times:
        with budget.at(time):
            model((2 - time) * batch())


def solved(model, times=TIMES, **options) -> ComputeBudget:
    config = ComputeBudgetConfig(**options)
    budget = solve_budget(config, model.eval(), lambda budget: walk(model, budget, times), times)
    assert budget is not None
    return budget


def active(model, budget, times=TIMES) -> float:
    with measure_active(model) as seen:
        walk(model, budget, times)
    return seen.mean


def by_layer(model, budget) -> list[float]:
    with measure_layers(model) as layers:
        walk(model, budget)
    return [layer.mean for layer in layers]


ROUTERS = [DTopPConfig(), DTopPConfig(layerwise=True), TopPConfig(), TopPConfig(drn=True, p=0.3)]


@pytest.mark.parametrize("router", ROUTERS, ids=repr)
@pytest.mark.parametrize("target", [1.0, 1.5, 8.0])
def test_a_solved_budget_gives_the_wanted_mean(router, target):
    model = stack(router)
    assert active(model, solved(model, target=target)) == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize("router", ROUTERS, ids=repr)
def test_targets_by_layer_and_by_time_are_met_by_each(router):
    model = stack(router)
    assert by_layer(model, solved(model, target=(1.5, 4.0, 2.5))) == pytest.approx([1.5, 4.0, 2.5], rel=0.02)
    budget = solved(model, target=(1.5, 4.0), vary="time")
    assert active(model, budget, TIMES[:2]) == pytest.approx(1.5, rel=0.02)  # the noise comes first
    assert active(model, budget, TIMES[2:]) == pytest.approx(4.0, rel=0.02)


def test_one_threshold_for_all_layers_lets_them_share_compute_unless_targets_are_by_layer():
    model = stack()
    shared, apart = solved(model, target=3.0), solved(model, target=(3.0, 3.0, 3.0))
    assert len(set(shared.overrides_PL[0])) == 1 and len(set(apart.overrides_PL[0])) == 3


def test_parts_of_the_way_are_equal_and_both_ends_belong_to_it():
    budget = budget_of(stack(), [[0.1] * 3, [0.2] * 3, [0.3] * 3, [0.4] * 3])
    found = []
    for time in (1.0, 0.76, 0.75, 0.5, 0.3, 0.25, 0.01, 0.0):
        with budget.at(time):
            found.append(budget.routers[0].threshold())
    assert found == [0.1, 0.1, 0.2, 0.3, 0.3, 0.4, 0.4, 0.4]
    times = [torch.tensor(t * 1000, dtype=torch.float32).item() / 1000 for t in torch.linspace(1, 0, 11).tolist()]
    assert [part_of(time, 10) for time in times] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9], "fp32 falls short of a tenth"


@pytest.mark.parametrize("p", [0.9, (0.2, 0.5, 0.9)])
def test_a_given_p_is_used_as_it_is_and_nothing_is_run_for_it(p):
    model = stack()
    budget = solve_budget(ComputeBudgetConfig(p=p), model, lambda budget: pytest.fail("nothing is to be solved"))
    wanted = list(p) if isinstance(p, tuple) else [p] * 3
    assert budget.thresholds_PL == [wanted]
    with budget.at():
        assert thresholds(model) == wanted


def test_the_trained_p_given_explicitly_changes_no_bit():
    model, x = stack().eval(), batch()
    trained = model(x)
    with ComputeBudget(model, [[routers_of(model)[0].trained_u()] * 3]).at():
        assert torch.equal(model(x), trained)


def test_top_k_uses_exactly_the_k_it_is_set_to_by_layer_and_by_time():
    model = stack(TopKConfig())
    assert by_layer(model, solved(model, target=(1.0, 3.0, 8.0))) == [1, 3, 8]
    budget = solved(model, target=(1.0, 4.0), vary="time")
    assert [active(model, budget, [time]) for time in TIMES] == [1, 1, 4, 4]
    assert thresholds(model) == [] and budget.thresholds_PL == []


@pytest.mark.parametrize("router", [DTopPConfig(), TopPConfig(), TopKConfig()], ids=repr)
def test_weights_modes_and_statistics_stay_and_outside_the_budget_the_model_is_as_trained(router):
    model, x = stack(router), batch()
    before, trained = copy.deepcopy(model.state_dict()), model.eval()(x)
    budget = solved(model.train(), target=3.0)
    walk(model, budget)
    with pytest.raises(RuntimeError), budget.at():
        raise RuntimeError
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(router.stats.sums is None and router.override is None for router in routers_of(model))
    assert torch.equal(model.eval()(x), trained)


@pytest.mark.parametrize(
    ("router", "options"),
    [
        (DTopPConfig(), {"target": (2.0, 3.0, 4.0)}),
        (TopKConfig(), {"target": (2.0, 3.0, 4.0)}),
        (None, {"p": (0.2,) * 3}),
    ],
    ids=repr,
)
def test_a_part_that_the_sampler_never_visits_is_refused(router, options):
    with pytest.raises(ConfigError, match=r"=\[.*\] has 3 values, and no step of the sampler is in part 2 of the way"):
        solved(stack(router), times=(1.0, 0.1), vary="time", **options)


def test_a_router_that_promises_a_threshold_and_has_none_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Promising(TopKConfig):
        ADJUSTABLE = "p"

    model = stack(TopKConfig())
    for router in routers_of(model):
        router.config = Promising()
    for options in ({"target": 3.0}, {"p": 0.5}):
        with pytest.raises(ConfigError, match="needs thresholds, and TopKRouter, whose config says it has one,"):
            solved(model, **options)


def test_a_stored_budget_is_what_the_saved_weights_hold():
    model, x = stack().eval(), batch()
    budget_of(model, [[0.2, 0.5, 0.9]]).apply()
    applied = model(x)
    store_in_weights(model)
    again = stack().eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), applied) and thresholds(again) == pytest.approx([0.2, 0.5, 0.9])


def test_weights_that_cannot_hold_a_budget_are_refused():
    bounded, topk = stack(DTopPConfig(controller=ControllerConfig(p_max=0.5))), stack(TopKConfig())
    store_in_weights(topk)  # nothing is set
    ComputeBudget(topk, [[3.0] * 3]).apply()
    budget_of(bounded, [[0.2, 0.5, 0.9]]).apply()
    with pytest.raises(ConfigError, match=r"sample asks for p=0\.9, which its controller keeps in \[0\.0, 0\.5\]"):
        store_in_weights(bounded)
    with pytest.raises(ConfigError, match=r"only the weights of dtopp routers can hold"):
        store_in_weights(topk)


def moe(router=None, **options) -> MoEConfig:
    return MoEConfig(experts=8, target=2.0, router=router or DTopPConfig(), **options)


@pytest.mark.parametrize(
    ("options", "section", "message"),
    [
        ({"target": 3.0}, None, r"target=3 needs a model whose routers have a threshold, or k, to set; drop the line"),
        ({"p": 0.5}, None, r"p=0\.5 needs a model whose routers"),
        ({"target": 3.0}, moe(RouterConfig()), r"target=3 needs a model whose routers"),
        ({"p": 0.5}, moe(TopKConfig()), r"p=0\.5 needs routers with a threshold, and these have k; set target"),
        ({"target": 2.5}, moe(TopKConfig()), r"target=2\.5 must be a whole number for top-k"),
        ({"target": (2.0, 2.5, 2.0)}, moe(TopKConfig()), r"target=2\.5 must be a whole number for top-k"),
        ({"target": 9.0}, moe(), r"target=9 is outside what the router allows, 1 to 8"),
        ({"target": 1.5}, moe(DTopPConfig(min_experts=2)), r"target=1\.5 is outside what the router allows, 2 to 8"),
        ({"target": (2.0, 3.0)}, moe(), r"target=\[2, 3\] has 2 values for 3 MoE layers; give 3"),
        ({"p": (0.5,)}, moe(), r"p=\[0\.5\] has 1 values for 3 MoE layers; give 3"),
        ({"target": 2.0, "p": 0.5}, moe(), r"p=0\.5 and target exclude each other; drop one"),
        ({"target": 0.0}, moe(), r"target=0\.0 must be above 0"),
        ({"target": (2.0, -1.0)}, moe(), r"target=\(2\.0, -1\.0\) must be above 0"),
        ({"target": ()}, moe(), r"target=\(\) is empty; give a number, or several"),
        ({"p": 1.5}, moe(), r"p=1\.5 must lie in \[0, 1\]"),
    ],
)
def test_impossible_budgets_and_those_that_a_model_cannot_have_are_refused(options, section, message):
    with pytest.raises(ConfigError, match=message):
        ComputeBudgetConfig(**options).check(section, layers=3)
