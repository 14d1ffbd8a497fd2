"""The PI controller against the equation, and in closed loop."""

import math

import pytest
import torch

from dit_moe.checkpoint import load_into
from dit_moe.config import ConfigError
from dit_moe.moe import ROUTERS, RoutingContext
from dit_moe.moe.routers.dtopp import ControllerConfig, DTopPConfig, PIController
from dit_moe.moe.routing import LARGEST_U, mass_left, prefix_mask, threshold_u


def closed_loop(
    experts: int,
    target: float,
    p0: float,
    steps: int = 400,
    tokens: int = 1024,
    theta=lambda step: 1 + step / 800,  # from 1 to 1.5 in 400 steps
    **gains,
) -> list[float]:
    """Active experts per step when the controller steers standardised logits that sharpen as a router's do."""
    generator = torch.Generator().manual_seed(0)
    controller = PIController(ControllerConfig(p0=p0, **gains), target, experts)
    history = []
    for step in range(steps):
        logits = torch.randn(tokens, experts, generator=generator)
        logits = (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True, correction=0)
        prob = (theta(step) * logits).softmax(-1)
        left, order = mass_left(prob)
        active = prefix_mask(left, order, tail=controller.tail).sum(-1, dtype=torch.float64).mean()
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
    total, reached = 0.0, False
    for active, slope in ((1.7, 2.0), (1.0, 0.01), (3.0, 2.0), (2.5, 4.0), (1.9, 0.5), (1.0, 0.01)):
        u, reached = -math.log(1 - controller.p.item()), reached or active >= 0.9 * 2.0
        error = max(-u, min(0.1 * u if reached else u, (2.0 - active) / max(slope, 0.05 * 2.0)))
        total += error
        controller.step(torch.tensor(active), torch.tensor(slope))
        assert controller.p.item() == pytest.approx(1 - 0.5 * math.exp(-(0.4 * error + 0.1 * total)), abs=1e-6)


def test_the_measured_slope_is_the_difference_that_a_small_move_makes():
    prob = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0)).softmax(-1)
    left, order = mass_left(prob)
    for p0 in (0.1, 0.6, 0.95):
        controller = PIController(ControllerConfig(p0=p0), target=4.0, experts=16)
        step = max(0.05, min(1.0, -math.log(1 - p0))) / 10
        pairs = [prefix_mask(left, order, tail=(1 - p0) * math.exp(-move)).sum() for move in (-step, step)]
        assert controller.slope(left).item() == pytest.approx((pairs[1] - pairs[0]).item() / (2 * step), rel=0.01)


@pytest.mark.parametrize(
    ("anti_windup", "after"),
    # e = 0.25, 0.25, 0.25, −0.25, −0.25 with K_P = 0, K_I = 1 from p0 = 0.5
    [(None, [0.75, 1.0, 1.0, 1.0, 0.75]), (False, [0.75, 1.0, 1.0, 1.0, 0.75]), (True, [0.75, 1.0, 1.0, 0.5, 0.25])],
)
def test_the_law_of_the_paper_adds_up_errors_at_the_clip_unless_it_is_asked_not_to(anti_windup, after):
    config = ControllerConfig(law="paper", kp=0.0, ki=1.0, p0=0.5, anti_windup=anti_windup)
    controller = PIController(config, target=3.0, experts=8)
    for active, p in zip((1.0, 1.0, 1.0, 5.0, 5.0), after, strict=True):
        controller.step(torch.tensor(active), FLAT)
        assert controller.p.item() == pytest.approx(p)


@pytest.mark.parametrize("options", [{"law": "paper", "anti_windup": True}, {"law": "scheduled"}])
def test_integration_stops_at_a_bound_and_recovery_is_immediate(options):
    controller = PIController(ControllerConfig(**options, kp=0.0, ki=1.0), target=2.0, experts=8)
    for _ in range(1000):
        controller.step(torch.tensor(0.0), FLAT)
    assert controller.p.item() == 1.0 and controller.tail.item() == 0.0
    controller.step(torch.tensor(8.0), FLAT)  # a wound-up integral would need hundreds of these
    assert controller.u.item() < LARGEST_U


SHAPES = [(4, 1.5), (16, 8), (64, 1.5), (128, 16)]


@pytest.mark.parametrize(("experts", "target"), SHAPES)
@pytest.mark.parametrize("p0", [0.05, 0.95])
def test_default_gains_settle_within_30_steps_from_a_wrong_start_and_stay(experts, target, p0):
    history = closed_loop(experts, target, p0, steps=100)
    assert all(abs(active - target) < 0.05 * target for active in history[30:])


@pytest.mark.parametrize(("experts", "target"), SHAPES)
def test_the_mean_over_the_last_quarter_is_within_one_percent_though_the_router_sharpens(experts, target):
    last = closed_loop(experts, target, p0=0.5)[-100:]
    assert abs(sum(last) / len(last) - target) < 0.01 * target


@pytest.mark.parametrize(("experts", "target", "theta"), [(8, 4, 10.0), (8, 2, 30.0), (8, 4, 30.0)])
def test_the_mean_stays_at_the_target_where_the_tail_is_below_what_p_can_tell_from_one(experts, target, theta):
    last = closed_loop(experts, target, p0=0.9, steps=120, tokens=4096, theta=lambda step: theta)[60:]
    assert last == pytest.approx([target] * 60, rel=0.1)  # seen: 5 %
    assert sum(last) / 60 == pytest.approx(target, rel=0.01)


def test_a_router_that_sharpens_and_flattens_again_lets_in_no_multiple_of_the_target():
    history = closed_loop(64, 8, p0=0.45, steps=40, theta=lambda step: 1 + step / 2 if step < 9 else 1.0)
    assert min(history) < 0.3 * 8 and max(history) < 2 * 8  # 7 times the target without the limit on what raises u


@pytest.mark.parametrize(("p", "p0", "error_sum"), [(0.7310585, 0.45, 1.4), (1.0, 1.0, -0.3), (0.0, 0.05, -0.1)])
def test_a_state_that_held_p_is_upgraded_to_the_same_threshold(p, p0, error_sum):
    old = {"p": torch.tensor(p), "p0": torch.tensor(p0), "error_sum": torch.tensor(error_sum, dtype=torch.float64)}
    module = torch.nn.ModuleDict({"router": PIController(ControllerConfig(), 2.0, 8)})
    weights = {f"router.{name}": value for name, value in old.items()}
    load_into(module, weights, "a checkpoint")
    controller = module["router"]
    assert controller.p.item() == pytest.approx(old["p"].item(), rel=1e-12)
    assert controller.tail.float() == 1 - old["p"] and controller.reached
    # Its law added to −ln(1 − p0), with 1 − p0 no less than 1e-6.
    controller.step(torch.tensor(2.0), FLAT)
    assert controller.u.item() == pytest.approx(max(0.0, -math.log(max(1 - p0, 1e-6)) + 0.5 * error_sum), rel=1e-6)
    again = PIController(ControllerConfig(), 2.0, 8)
    again.load_state_dict(old)  # as transformers and torch do it
    assert "p" in old and again.p.item() == pytest.approx(old["p"].item(), rel=1e-12)


def test_restart_forgets_the_integral():
    controller = PIController(ControllerConfig(), 2.0, 8)
    controller.step(torch.tensor(5.0), FLAT)
    controller.restart(threshold_u(0.7))
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


def by_time(**options):
    """A router of 16-wide tokens, of four samples at times of their own."""
    torch.manual_seed(0)
    router = ROUTERS.build(DTopPConfig(init_std=0.25, **options), 16, 8, 2)
    generator = torch.Generator().manual_seed(1)
    x, time = torch.randn(40, 16, generator=generator), torch.randn(4, 16, generator=generator)
    return router, x, RoutingContext(samples=4, time_BD=time)


def test_a_scale_by_time_starts_as_plain_dtopp_to_the_bit_and_learns_from_there():
    (plain, x, context), (timed, _, _) = by_time(), by_time(theta_by_time=True)
    for router in (plain, timed):
        with torch.no_grad():
            router.theta.fill_(1.3)
    assert torch.equal(plain.scores(x, context).score_NE, timed.scores(x, context).score_NE)
    routing = timed(x, context)
    (routing.weight_R * torch.arange(len(routing.weight_R))).sum().backward()
    assert timed.time_weight.grad.abs().max() > 0
    assert sum(timed.config.size(8, 16)) == sum(p.numel() for p in timed.parameters())


def test_the_scale_by_time_is_that_of_the_sample():
    router, x, context = by_time(theta_by_time=True)
    with torch.no_grad():
        router.theta.fill_(1.3)
        router.time_weight.normal_(std=0.3)
    normal = router.normalized(router.logits(x, context), context).double()
    for n in range(40):
        exponent = sum(
            w * t for w, t in zip(router.time_weight.tolist(), context.time_BD[n // 10].tolist(), strict=True)
        )
        assert normal[n].std(correction=0).item() == pytest.approx(1.3 * math.exp(exponent), rel=0.01)  # DRN_EPS


def test_a_scale_by_time_needs_normalization_and_images():
    with pytest.raises(ConfigError, match="theta_by_time=True scales what drn normalises; set drn: true"):
        DTopPConfig(drn=False, theta_by_time=True)
    with pytest.raises(ConfigError, match="theta_by_time=True is for images"):
        DTopPConfig(theta_by_time=True).check_text()
