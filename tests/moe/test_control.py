"""The PI controller against the equation, and in closed loop."""

import math

import pytest
import torch

from dit_moe.config import ConfigError
from dit_moe.moe.control import ControllerConfig, PIController
from dit_moe.moe.routing import mass_left, prefix_mask


def closed_loop(experts: int, target: float, p0: float, steps: int = 400, tokens: int = 1024, **gains) -> list[float]:
    """Active experts per step when the controller steers standardised logits that sharpen as a router's do."""
    generator = torch.Generator().manual_seed(0)
    controller = PIController(ControllerConfig(p0=p0, **gains), target, experts)
    history = []
    for step in range(steps):
        logits = torch.randn(tokens, experts, generator=generator)
        logits = (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True, correction=0)
        prob = ((1 + step / 800) * logits).softmax(-1)  # θ from 1 to 1.5 in 400 steps
        left, order = mass_left(prob)
        active = prefix_mask(left, order, controller.p).sum(-1, dtype=torch.float64).mean()
        controller.step(active, controller.slope(left) / tokens)
        history.append(active.item())
    return history


FLAT = torch.tensor(2.0)  # a slope, where it does not matter


def test_the_law_of_the_paper_is_its_equation():
    controller = PIController(ControllerConfig(law="paper", kp=0.4, ki=0.1, p0=0.5), target=2.0, experts=8)
    total = 0.0
    for active in (3.0, 2.5, 1.0, 2.0):
        error = (2.0 - active) / 8
        total += error
        controller.step(torch.tensor(active), FLAT)
        assert controller.p.item() == pytest.approx(0.5 + 0.4 * error + 0.1 * total, abs=1e-6)


def test_the_scheduled_law_is_the_same_equation_in_units_of_the_threshold():
    controller = PIController(ControllerConfig(kp=0.4, ki=0.1, p0=0.5), target=2.0, experts=8)
    total = 0.0
    for active, slope in ((3.0, 2.0), (2.5, 4.0), (1.9, 0.5), (1.0, 0.01)):
        u = -math.log(1 - controller.p.item())
        error = max(-u, min(u, (2.0 - active) / max(slope, 0.05 * 2.0)))
        total += error
        controller.step(torch.tensor(active), torch.tensor(slope))
        assert controller.p.item() == pytest.approx(1 - 0.5 * math.exp(-(0.4 * error + 0.1 * total)), abs=1e-6)


def test_the_measured_slope_is_the_difference_that_a_small_move_makes():
    prob = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0)).softmax(-1)
    left, order = mass_left(prob)
    for p0 in (0.1, 0.6, 0.95):
        controller = PIController(ControllerConfig(p0=p0), target=4.0, experts=16)
        step = max(0.05, min(1.0, -math.log(1 - p0))) / 10
        pairs = [prefix_mask(left, order, 1 - (1 - p0) * math.exp(-move)).sum() for move in (-step, step)]
        assert controller.slope(left).item() == pytest.approx((pairs[1] - pairs[0]).item() / (2 * step), rel=0.01)


@pytest.mark.parametrize("law", ["paper", "scheduled"])
def test_too_few_active_experts_raise_p_and_too_many_lower_it(law):
    for active, sign in ((1.0, 1), (3.0, -1)):
        controller = PIController(ControllerConfig(law=law), target=2.0, experts=8)
        controller.step(torch.tensor(active), FLAT)
        assert (controller.p.item() - 0.5) * sign > 0


@pytest.mark.parametrize("law", ["paper", "scheduled"])
def test_integration_stops_at_a_bound_and_recovery_is_immediate(law):
    controller = PIController(ControllerConfig(law=law, kp=0.0, ki=1.0), target=2.0, experts=8)
    for _ in range(1000):
        controller.step(torch.tensor(0.0), FLAT)
    assert controller.p.item() == 1.0
    controller.step(torch.tensor(8.0), FLAT)  # a wound-up integral of 250 would need 333 of these
    assert controller.p.item() < 1.0


SHAPES = [(4, 1.5), (4, 3), (8, 2), (16, 2), (16, 8), (64, 1.5), (64, 8), (128, 16)]


@pytest.mark.parametrize(("experts", "target"), SHAPES)
@pytest.mark.parametrize("p0", [0.05, 0.95])
def test_default_gains_settle_within_30_steps_from_a_wrong_start_and_stay(experts, target, p0):
    history = closed_loop(experts, target, p0, steps=100)
    assert all(abs(active - target) < 0.05 * target for active in history[30:])


@pytest.mark.parametrize(("experts", "target"), SHAPES)
def test_the_mean_over_the_last_quarter_is_within_one_percent_though_the_router_sharpens(experts, target):
    last = closed_loop(experts, target, p0=0.5)[-100:]
    assert abs(sum(last) / len(last) - target) < 0.01 * target


def test_state_survives_a_state_dict_round_trip_and_steps_on_bit_for_bit():
    first = PIController(ControllerConfig(), 2.0, 8)
    for active in (3.0, 2.2, 1.7):
        first.step(torch.tensor(active), FLAT)
    second = PIController(ControllerConfig(), 2.0, 8)
    second.load_state_dict(first.state_dict())
    for controller in (first, second):
        controller.step(torch.tensor(1.234), FLAT)
    assert torch.equal(first.p, second.p) and torch.equal(first.error_sum, second.error_sum)


def test_restart_forgets_the_integral():
    controller = PIController(ControllerConfig(), 2.0, 8)
    controller.step(torch.tensor(5.0), FLAT)
    controller.restart(0.7)
    assert controller.p.item() == pytest.approx(0.7) and controller.error_sum == 0
    controller.step(torch.tensor(2.0), FLAT)
    assert controller.p.item() == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kp": -1.0}, "kp=-1.0"), ({"p0": 1.5}, "p0=1.5"), ({"p_min": 0.9, "p_max": 0.1}, "p_min")],
)
def test_bad_gains_and_bounds_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ControllerConfig(**options)
