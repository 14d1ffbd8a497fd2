import numpy as np
import pytest

from dit_moe.analysis.choose import (
    RARE,
    divergence,
    extremes,
    lift,
    most_bits,
    neighbours_first,
    relative_load,
    some_layers,
    specialisation,
    windows,
)


def test_experts_that_are_the_same_for_all_classes_tell_nothing_and_disjoint_ones_tell_the_class():
    same = np.tile([0.5, 0.3, 0.2, 0.0], (1, 4, 1))
    disjoint = np.eye(4)[None]
    assert specialisation(same) == pytest.approx([0.0])
    assert specialisation(disjoint) == pytest.approx([2.0])  # log2 of 4 classes


def test_specialisation_is_the_mutual_information_of_class_and_expert():
    load_CE = np.random.default_rng(0).dirichlet(np.ones(5), size=7)
    joint = load_CE / 7
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    assert specialisation(load_CE[None])[0] == pytest.approx((joint * np.log2(joint / independent)).sum())


def test_divergence_is_the_highest_for_the_class_that_differs():
    load = np.full((1, 5, 4), 0.25)
    load[0, 3] = [0.7, 0.1, 0.1, 0.1]
    assert divergence(load)[0].argmax() == 3 and divergence(load).min() >= 0


def test_relative_load_is_one_on_average_and_unknown_for_rare_experts():
    load = np.array([[[0.6, 0.4 - 0.1 * RARE / 3, 0.1 * RARE / 3], [0.4, 0.6 - 0.1 * RARE / 3, 0.1 * RARE / 3]]])
    ratios = relative_load(load)
    assert ratios[0, :, :2].mean(0) == pytest.approx([1.0, 1.0])
    assert np.isnan(ratios[0, :, 2]).all()


def test_lift_is_one_for_independent_experts_and_nothing_on_the_diagonal():
    use = np.array([0.5, 0.4, 0.3])
    together = np.outer(use, use)
    np.fill_diagonal(together, use)
    lifts = lift(together)
    assert lifts[0, 1] == pytest.approx(1.0) and lifts[0, 2] == lifts[1, 2] == pytest.approx(1.0)
    assert np.isnan(np.diagonal(lifts)).all()
    together[0, 1] = together[1, 0] = 2 * 0.5 * 0.4
    assert lift(together)[0, 1] == pytest.approx(2 * lift(together)[0, 2])


@pytest.mark.parametrize("experts, k", [(8, 2), (8, 3), (64, 8)])
def test_lift_is_one_for_top_k_without_preferences(experts, k):
    share, both = k / experts, k * (k - 1) / experts / (experts - 1)
    lifts = lift(np.full((experts, experts), both) + (share - both) * np.eye(experts))
    assert lifts[~np.eye(experts, dtype=bool)] == pytest.approx(1.0)


def test_the_most_there_is_to_tell_is_bounded_by_classes_and_by_experts():
    assert most_bits(np.ones((1, 2, 8))) == 1 and most_bits(np.ones((1, 1000, 8))) == 3


def test_lift_of_an_expert_never_used_is_unknown():
    together = np.diag([0.5, 0.5, 0.0])
    assert np.isnan(lift(together)[2]).all() and np.isnan(lift(together)[:, 2]).all()


def test_shuffled_neighbours_are_found_again():
    place = np.arange(20)
    shuffled = np.random.default_rng(1).permutation(20)
    near = np.exp(-np.abs(place[:, None] - place) / 2.0)[np.ix_(shuffled, shuffled)]
    order = shuffled[neighbours_first(near)]
    assert (np.abs(np.diff(order)) == 1).all()


def test_windows_keep_the_mean_and_leave_short_curves_alone():
    curve = np.random.default_rng(2).standard_normal((3, 960))
    (short,) = windows([curve], most=240)
    assert short.shape == (3, 240) and short.mean(1) == pytest.approx(curve.mean(1))
    (same,) = windows([curve[:, :100]], most=240)
    assert (same == curve[:, :100]).all()


def test_the_last_window_may_be_shorter():
    (short,) = windows([np.arange(5.0)], most=3)
    assert short.tolist() == [0.5, 2.5, 4.0]


def test_extremes_are_the_highest_and_the_lowest():
    values = np.array([3.0, 1.0, 9.0, 5.0, 7.0, 2.0])
    assert extremes(values, 4) == [2, 4, 5, 1]
    assert extremes(values, 6) == [2, 4, 3, 0, 5, 1]


def test_some_layers_hold_the_first_and_the_last():
    assert some_layers(28, 6) == [0, 5, 11, 16, 22, 27] and some_layers(4, 6) == [0, 1, 2, 3]
