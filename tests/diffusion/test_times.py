"""Draws of training times and the time shift."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_moe.diffusion import OBJECTIVES, FlowConfig
from dit_moe.diffusion.flow import logit_normal, shift_time
from dit_moe.randomness import BatchRandom


def flow(**options):
    return OBJECTIVES.build(FlowConfig(**options), num_classes=1)


def draws(stratified: bool, step: int, total: int = 64) -> torch.Tensor:
    return flow(stratified=stratified).draw_times(BatchRandom(0, "train", step, total=total), (4, 8, 8))


def test_stratified_means_vary_far_less_than_plain_ones() -> None:
    plain, stratified = (torch.stack([draws(kind, step).mean() for step in range(200)]) for kind in (False, True))
    assert plain.std() == pytest.approx(1 / math.sqrt(12 * 64), rel=0.2)  # of 200 means: within 15 %
    assert stratified.std() == pytest.approx(1 / math.sqrt(12 * 64**3), rel=0.2)  # one draw in each of 64 strata
    assert stratified.mean() == pytest.approx(0.5, abs=1e-4 * 5)


def test_stratified_times_stay_spread_through_logit_normal() -> None:
    t = logit_normal(draws(True, 0), mean=0.5, std=0.7)
    u = torch.special.ndtr((torch.logit(t.double()) - 0.5) / 0.7)
    assert (u * 64).long().sort().values.tolist() == list(range(64))


def test_logit_normal_has_the_mean_and_std_asked_for() -> None:
    logits = torch.logit(logit_normal(draws(False, 0, total=100_000), mean=-0.4, std=1.2).double())
    assert logits.mean() == pytest.approx(-0.4, abs=0.02)  # 5 standard errors of 100 000 draws
    assert logits.std() == pytest.approx(1.2, abs=0.02)


def test_logit_normal_of_the_extreme_draws_stays_in_the_unit_interval() -> None:
    assert logit_normal(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]


@given(t=st.floats(0, 1), factor=st.floats(0.05, 20))
def test_shift_is_undone_by_the_inverse_factor(t: float, factor: float) -> None:
    time = torch.tensor(t, dtype=torch.float64)
    torch.testing.assert_close(shift_time(shift_time(time, factor), 1 / factor), time, atol=1e-13, rtol=1e-12)


@given(factor=st.floats(0.01, 100))
def test_shift_keeps_the_ends_exactly_and_the_order(factor: float) -> None:
    shifted = shift_time(torch.linspace(0, 1, 50, dtype=torch.float64), factor)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert (shifted.diff() > 0).all()


def test_shift_follows_the_formula_and_moves_towards_noise() -> None:
    assert shift_time(torch.tensor(0.5), 3.0).item() == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))


def test_resolution_shift_is_the_root_of_the_ratio_of_sizes() -> None:
    by_size = flow(time_shift="resolution", base_dims=4096)
    assert by_size.shift((4, 64, 64)) == 2.0 and by_size.shift((4, 32, 32)) == 1.0
    assert flow(time_shift=1.5).shift((4, 64, 64)) == 1.5
