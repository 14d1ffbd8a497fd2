"""A trained network at work with more or fewer experts a token, and as trained again behind that."""

import copy
from dataclasses import dataclass

import pytest
import torch

from dit_moe.config import ConfigError
from dit_moe.moe import MoEConfig, measure_active, measure_layers, routers_of
from dit_moe.moe.compute_budget import Dial, DialConfig, absorb, part_of, thresholds, turn
from dit_moe.moe.control import ControllerConfig
from dit_moe.moe.routers.base import RouterConfig
from dit_moe.moe.routers.dtopp import DTopPConfig
from dit_moe.moe.routers.topk import TopKConfig
from dit_moe.moe.routers.topp import TopPConfig
from dit_moe.moe.routing import threshold_u
from tests.moe.stack import batch, stack

TIMES = (1.0, 0.7, 0.4, 0.1)


def dial_at(model, p_PL) -> Dial:
    return Dial(model, [[threshold_u(p) for p in p_L] for p_L in p_PL])


def walk(model, dial, times=TIMES):
    """A way from noise to data whose tokens change on it: they grow, and routing sharpens."""
    for time in times:
        with dial.at(time):
            model((2 - time) * batch())


def turned(model, times=TIMES, **options) -> Dial:
    dial = turn(DialConfig(**options), model.eval(), lambda dial: walk(model, dial, times), times)
    assert dial is not None
    return dial


def active(model, dial, times=TIMES) -> float:
    with measure_active(model) as seen:
        walk(model, dial, times)
    return seen.mean


def by_layer(model, dial) -> list[float]:
    with measure_layers(model) as layers:
        walk(model, dial)
    return [layer.mean for layer in layers]


ROUTERS = [DTopPConfig(), DTopPConfig(layerwise=True), TopPConfig(), TopPConfig(drn=True, p=0.3)]


@pytest.mark.parametrize("router", ROUTERS, ids=repr)
@pytest.mark.parametrize("target", [1.0, 1.5, 4.0, 8.0])
def test_a_solved_dial_gives_the_wanted_mean(router, target):
    model = stack(router)
    assert active(model, turned(model, target=target)) == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize("router", ROUTERS, ids=repr)
def test_targets_by_layer_are_met_by_each_layer(router):
    model = stack(router)
    assert by_layer(model, turned(model, target=(1.5, 4.0, 2.5))) == pytest.approx([1.5, 4.0, 2.5], rel=0.02)


@pytest.mark.parametrize("router", ROUTERS[:2], ids=repr)
def test_targets_by_time_are_met_in_each_part_the_noise_first(router):
    model = stack(router)
    dial = turned(model, target=(1.5, 4.0), vary="time")
    assert active(model, dial, TIMES[:2]) == pytest.approx(1.5, rel=0.02)
    assert active(model, dial, TIMES[2:]) == pytest.approx(4.0, rel=0.02)


def test_one_threshold_for_all_layers_lets_them_share_compute_unless_targets_are_by_layer():
    model = stack()
    shared, apart = turned(model, target=3.0), turned(model, target=(3.0, 3.0, 3.0))
    assert len(set(shared.settings_PL[0])) == 1 and len(set(apart.settings_PL[0])) == 3


def test_parts_of_the_way_are_equal_and_both_ends_belong_to_it():
    model = stack()
    dial = dial_at(model, [[0.1] * 3, [0.2] * 3, [0.3] * 3, [0.4] * 3])
    found = []
    for time in (1.0, 0.76, 0.75, 0.5, 0.3, 0.25, 0.01, 0.0):
        with dial.at(time):
            found.append(thresholds(model)[0])
    assert found == [0.1, 0.1, 0.2, 0.3, 0.3, 0.4, 0.4, 0.4]


@pytest.mark.parametrize("options", [{"p": 0.9}, {"p": (0.2, 0.5, 0.9)}])
def test_a_given_p_is_used_as_it_is_and_nothing_is_run_for_it(options):
    model, value = stack(), options["p"]
    dial = turn(DialConfig(**options), model, lambda dial: pytest.fail("nothing is to be solved"))
    wanted = list(value) if isinstance(value, tuple) else [value] * 3
    assert dial.thresholds_PL == [wanted]
    with dial.at():
        assert thresholds(model) == wanted


def test_the_trained_p_given_explicitly_changes_no_bit():
    model, x = stack().eval(), batch()
    model(x)
    trained = model(x)
    with Dial(model, [[routers_of(model)[0].trained_u()] * 3]).at():
        assert torch.equal(model(x), trained)


def test_top_k_uses_exactly_the_k_it_is_set_to_by_layer_and_by_time():
    model = stack(TopKConfig())
    assert by_layer(model, turned(model, target=(1.0, 3.0, 8.0))) == [1, 3, 8]
    dial = turned(model, target=(1.0, 4.0), vary="time")
    assert [active(model, dial, [time]) for time in TIMES] == [1, 1, 4, 4]
    assert thresholds(model) == [] and dial.thresholds_PL == []


@pytest.mark.parametrize("router", [DTopPConfig(), TopPConfig(), TopKConfig()], ids=repr)
def test_weights_modes_and_counters_stay_and_behind_the_dial_the_model_is_as_trained(router):
    model, x = stack(router), batch()
    before, trained = copy.deepcopy(model.state_dict()), model.eval()(x)
    dial = turned(model.train(), target=3.0)
    walk(model, dial)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(router.stats.sums is None for router in routers_of(model))
    assert torch.equal(model.eval()(x), trained)


def test_an_error_within_leaves_no_setting_behind():
    model = stack()
    with pytest.raises(RuntimeError), dial_at(model, [[0.9] * 3]).at():
        raise RuntimeError
    assert all(router.setting is None for router in routers_of(model))


@pytest.mark.parametrize(
    ("router", "options"),
    [
        (DTopPConfig(), {"target": (2.0, 3.0, 4.0)}),
        (TopKConfig(), {"target": (2.0, 3.0, 4.0)}),
        (None, {"p": (0.2, 0.3, 0.4)}),
    ],
    ids=repr,
)
def test_a_part_that_the_sampler_never_visits_is_refused(router, options):
    with pytest.raises(ConfigError, match=r"=\[.*\] has 3 values, and no step of the sampler is in part 2 of the way"):
        turned(stack(router), times=(1.0, 0.1), vary="time", **options)


def test_a_time_in_fp32_lies_in_the_part_that_begins_there():
    times = [torch.tensor(t * 1000, dtype=torch.float32).item() / 1000 for t in torch.linspace(1, 0, 11).tolist()]
    assert [part_of(time, 10) for time in times] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]


def test_a_router_that_promises_a_threshold_and_has_none_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Promising(TopKConfig):
        DIAL = "p"

    model = stack(TopKConfig())
    for router in routers_of(model):
        router.config = Promising()
    for options in ({"target": 3.0}, {"p": 0.5}):
        with pytest.raises(ConfigError, match=r"needs thresholds, and TopKRouter is no TopPRouter, for all its DIAL"):
            turned(model, **options)


def test_a_threshold_that_the_controller_would_not_keep_is_not_absorbed():
    model = stack(DTopPConfig(controller=ControllerConfig(p_max=0.5)))
    dial_at(model, [[0.2, 0.5, 0.9]]).keep()
    with pytest.raises(ConfigError, match=r"sample asks for p=0\.9, which its controller keeps in \[0\.0, 0\.5\]"):
        absorb(model)


def test_an_absorbed_dial_is_what_the_saved_weights_hold():
    model, x = stack().eval(), batch()
    dial_at(model, [[0.2, 0.5, 0.9]]).keep()
    kept = model(x)
    absorb(model)
    again = stack().eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), kept) and thresholds(again) == pytest.approx([0.2, 0.5, 0.9])


def test_routers_whose_weights_hold_no_threshold_absorb_none():
    model = stack(TopKConfig())
    absorb(model)  # nothing is set
    Dial(model, [[3.0] * 3]).keep()
    with pytest.raises(ConfigError, match=r"only the weights of dtopp routers can hold"):
        absorb(model)


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
    ],
)
def test_what_a_model_cannot_do_is_refused(options, section, message):
    with pytest.raises(ConfigError, match=message):
        DialConfig(**options).check(section, layers=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 2.0, "p": 0.5}, r"p=0\.5 and target exclude each other; drop one"),
        ({"target": 0.0}, r"target=0\.0 must be above 0"),
        ({"target": (2.0, -1.0)}, r"target=\(2\.0, -1\.0\) must be above 0"),
        ({"target": ()}, r"target=\(\) is empty; give a number, or several"),
        ({"p": 1.5}, r"p=1\.5 must lie in \[0, 1\]"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        DialConfig(**options)
