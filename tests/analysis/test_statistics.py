"""Numbers computed from what was counted, and the files that keep all of it."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dit_moe.analysis import statistics
from dit_moe.analysis.collect_images import collect_images
from dit_moe.analysis.statistics import (
    RARE,
    divergence,
    lift,
    most_bits,
    neighbours_first,
    relative_load,
    specialisation,
    write_stats,
)
from tests.analysis.runs import Chosen, image_run


def test_specialisation_is_the_mutual_information_of_class_and_expert():
    load_CE = np.random.default_rng(0).dirichlet(np.ones(5), size=7)
    joint = load_CE / 7
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    assert specialisation(load_CE[None])[0] == pytest.approx((joint * np.log2(joint / independent)).sum())
    assert specialisation(np.tile([0.5, 0.3, 0.2, 0.0], (1, 4, 1))) == pytest.approx([0.0])
    assert specialisation(np.eye(4)[None]) == pytest.approx([2.0])  # log2 of 4 classes
    assert most_bits(np.ones((1, 2, 8))) == 1 and most_bits(np.ones((1, 1000, 8))) == 3


def test_a_class_that_uses_no_expert_has_no_part_in_what_the_others_show():
    load = np.random.default_rng(0).dirichlet(np.ones(4), size=(2, 3))
    some = load[:, [0, 2]]
    load[:, 1] = np.nan
    assert specialisation(load) == pytest.approx(specialisation(some))
    np.testing.assert_allclose(relative_load(load)[:, [0, 2]], relative_load(some))
    assert np.isnan(divergence(load)[:, 1]).all() and np.isnan(specialisation(np.full((1, 2, 4), np.nan))).all()


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
    never_used = lift(np.diag([0.5, 0.5, 0.0]))
    assert np.isnan(never_used[2]).all() and np.isnan(never_used[:, 2]).all()


@pytest.mark.parametrize("experts, k", [(8, 2), (64, 8)])
def test_lift_is_one_for_top_k_without_preferences(experts, k):
    share, both = k / experts, k * (k - 1) / experts / (experts - 1)
    lifts = lift(np.full((experts, experts), both) + (share - both) * np.eye(experts))
    assert lifts[~np.eye(experts, dtype=bool)] == pytest.approx(1.0)


def test_shuffled_neighbours_are_found_again():
    place = np.arange(20)
    shuffled = np.random.default_rng(1).permutation(20)
    near = np.exp(-np.abs(place[:, None] - place) / 2.0)[np.ix_(shuffled, shuffled)]
    order = shuffled[neighbours_first(near)]
    assert (np.abs(np.diff(order)) == 1).all()


# ----------------------------------------------------------------------------------------------------------- the files


@pytest.fixture(scope="module")
def stats():
    return collect_images(image_run(), Chosen(list(range(12))), times=3)


def saved(stats, folder, pictures=()):
    write_stats(stats, folder, pictures)
    return json.loads((folder / "routing.json").read_text()), np.load(folder / "routing.npz")


def test_all_arrays_are_kept_and_the_json_has_facts_names_and_small_ones_and_says_what_it_leaves_out(
    stats, tmp_path, monkeypatch
):
    body, arrays = saved(stats, tmp_path)
    assert np.array_equal(arrays["load_LTE"], stats.load_LTE)
    assert np.array_equal(arrays["examples.noisy_MTHWC"], stats.examples.noisy_MTHWC)
    assert "position_S" not in arrays  # there is none
    assert body["facts"] == stats.facts and body["layers_L"] == [0, 1, 2] and body["training"] is None
    assert body["active"] == pytest.approx(stats.active, rel=1e-5)
    np.testing.assert_allclose(body["load_LCE"], stats.load_LCE, rtol=1e-5)
    np.testing.assert_array_equal(body["examples"]["active_MTLS"], stats.examples.active_MTLS)
    assert body["only in routing.npz"] == ["examples.images_MHWC", "examples.noisy_MTHWC"]
    assert set(body["only in routing.npz"]) <= set(arrays)
    monkeypatch.setattr(statistics, "SMALL", stats.load_LCE.size - 1)
    body, _ = saved(stats, tmp_path)
    assert "load_LCE" not in body and "load_LCE" in body["only in routing.npz"] and "load_LE" in body


def test_shares_of_what_uses_no_expert_are_null_in_the_json(stats, tmp_path):
    load_LE = np.full_like(stats.load_LE, np.nan)
    body, arrays = saved(replace(stats, load_LE=load_LE), tmp_path)
    assert body["load_LE"] == [[None] * 4] * 3 and body["balance_L"] == [None] * 3
    assert np.isnan(arrays["load_LE"]).all()


def test_pictures_of_an_earlier_report_go_and_nobody_elses(stats, tmp_path):
    for name in ("load.png", "maps.png", "mine.png"):
        (tmp_path / name).touch()
    body, _ = saved(stats, tmp_path, ["load.png", "maps.png"])
    assert body["pictures"] == ["load.png", "maps.png"]
    saved(stats, tmp_path, ["load.png"])
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["load.png", "mine.png"]


@pytest.mark.parametrize("text", ["{", '{"pictures": 3}', '{"pictures": ["../mine.png", 3]}'])
def test_a_list_that_is_damaged_deletes_nothing(stats, tmp_path, text):
    (tmp_path / "mine.png").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "routing.json").write_text(text)
    saved(stats, tmp_path / "out")
    assert (tmp_path / "mine.png").exists()
