"""Solving thresholds for a wanted number of active experts."""

import copy

import pytest
import torch

from dit_moe.moe import routers_of, update_routers
from dit_moe.moe.calibrate import calibrate, record_joining, starts_unsolved, steered_routers
from dit_moe.moe.control import ControllerConfig
from dit_moe.moe.routers.dtopp import DTopPConfig
from dit_moe.moe.routers.topk import TopKConfig
from tests.moe.stack import batch, stack, thresholds


def measured(model, x) -> tuple[float, list[float]]:
    """Mean active experts over all layers, and by layer."""
    model(x)
    report = update_routers(model)
    return report["active"], report["layers"]["active"]


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("target", [None, 1.5, 4.0, 7.5])
def test_solved_thresholds_meet_the_target_on_the_same_tokens(layerwise, target):
    model, x = stack(DTopPConfig(layerwise=layerwise)), batch()
    solved = calibrate(model, lambda: model(x), target)
    assert solved == thresholds(model) and (len(set(solved)) > 1) == layerwise
    wanted = target or 2.0
    mean, layers = measured(model, x)
    assert mean == pytest.approx(wanted, rel=0.01)  # counts are whole: 256 tokens · 3 layers
    if layerwise:
        assert layers == pytest.approx([wanted] * 3, rel=0.01)


def test_the_solution_does_not_depend_on_how_the_tokens_are_cut():
    x = batch()
    whole, parts = stack(), stack()
    calibrate(whole, lambda: whole(x))
    calibrate(parts, lambda: [parts(part) for part in x.split(1)])
    assert thresholds(whole) == pytest.approx(thresholds(parts), abs=1e-6)  # fp32 GEMMs of another shape


def test_a_sharp_router_reaches_targets_far_in_the_tail_of_its_probabilities():
    model, x = stack(experts=64, target=8.0), batch()
    with torch.no_grad():
        for router in routers_of(model):
            router.theta.fill_(5.0)
    calibrate(model, lambda: model(x), 24.0)
    assert measured(model, x)[0] == pytest.approx(24.0, rel=0.02)


def test_a_tail_below_what_p_can_tell_from_one_is_solved_too():
    model, x = stack(), batch()
    with torch.no_grad():
        for router in routers_of(model):
            router.theta.fill_(30.0)
    assert calibrate(model, lambda: model(x), 4.0)[0] > 1 - 1e-12
    assert measured(model, x)[0] == pytest.approx(4.0, rel=0.01)


def test_every_expert_and_one_expert_are_the_ends():
    model, x = stack(), batch()
    calibrate(model, lambda: model(x), 8.0)
    assert measured(model, x)[0] == pytest.approx(8.0, rel=0.01)
    calibrate(model, lambda: model(x), 1.0)
    assert measured(model, x)[0] == pytest.approx(1.0, rel=0.01)


def test_limits_of_experts_per_token_are_part_of_the_solution():
    model, x = stack(DTopPConfig(min_experts=2, max_experts=4), target=3.0), batch()
    calibrate(model, lambda: model(x))
    assert measured(model, x)[0] == pytest.approx(3.0, rel=0.01)


def test_a_solution_outside_the_bounds_of_p_stops_at_the_bound():
    model, x = stack(DTopPConfig(controller=ControllerConfig(p_min=0.9))), batch()
    assert calibrate(model, lambda: model(x), 1.5) == pytest.approx([0.9] * 3)


def test_sums_over_ranks_decide_and_not_the_own_tokens():
    alone, together = stack(), stack()
    mine, others = batch(0), 3 * batch(1)
    calibrate(alone, lambda: [alone(mine), alone(others)])

    def reduce(counts):  # adds what another rank would send
        with torch.no_grad(), record_joining(steered_routers(together)) as histograms:
            together(others)
        return counts + torch.stack(histograms)

    calibrate(together, lambda: together(mine), reduce=reduce)
    assert thresholds(together) == pytest.approx(thresholds(alone), abs=1e-6)


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
    assert starts_unsolved(stack())
    assert not starts_unsolved(stack(DTopPConfig(controller=ControllerConfig(p0=0.4))))
    assert not starts_unsolved(stack(TopKConfig()))
    assert thresholds(stack(DTopPConfig(controller=ControllerConfig(p0=0.4)))) == pytest.approx([0.4] * 3)
