"""Means, spreads and paired differences of a study."""

import math

import numpy as np
import pytest

from dit_moe.studies.statistics import by_objective, paired_difference, spread, summaries
from tests.studies.examples import results


@pytest.mark.parametrize(("pairs", "quantile"), [(2, 12.706), (3, 4.303), (8, 2.365), (31, 2.042)])  # published
def test_the_interval_is_students(pairs, quantile):
    differences = np.random.default_rng(0).normal(size=pairs)
    paired = paired_difference(dict(enumerate(differences)), dict.fromkeys(range(pairs), 0.0))
    half = quantile * np.std(differences, ddof=1) / math.sqrt(pairs)
    assert (paired.low, paired.high) == pytest.approx((paired.mean - half, paired.mean + half), rel=1e-3)  # of tables


def test_a_difference_is_of_the_seeds_that_both_have():
    paired = paired_difference({0: 1.0, 1: 2.5, 7: 9.0}, {1: 2.0, 0: 1.2, 5: 3.0})
    assert (paired.n, paired.baseline) == (2, 1.6)
    assert paired.mean == pytest.approx((-0.2 + 0.5) / 2)
    assert not paired.excludes_zero


def test_one_pair_has_a_difference_and_no_interval_and_no_pair_neither():
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    paired = paired_difference({0: 1.1}, {0: 1.0})
    assert (paired.low, paired.high, paired.n) == (None, None, 1)
    assert paired.mean == pytest.approx(0.1) and paired.relative == pytest.approx(0.1)
    assert not paired.excludes_zero


def test_a_spread_counts_what_is_there():
    assert spread([]) is spread([None]) is None
    assert (spread([2.0, None]).mean, spread([2.0, None]).std, spread([2.0, None]).n) == (2.0, None, 1)
    assert spread([1.0, 3.0]).std == pytest.approx(math.sqrt(2))


def test_every_variant_is_compared_with_its_own_baseline():
    rows = {row.variant.name: row for row in summaries(results())}
    assert rows["topk"].difference is rows["topk-16E4A"].difference is None
    losses = {name: [run.loss for run in row.runs] for name, row in rows.items()}
    wanted = np.mean(losses["dtopp-16E4A"]) - np.mean(losses["topk-16E4A"])
    assert rows["dtopp-16E4A"].difference.mean == pytest.approx(wanted)
    assert rows["dtopp-16E4A"].slowdown == pytest.approx(0.182 / 0.171)


@pytest.mark.parametrize(("means", "off"), [((1.9, 2.0, 2.06), -0.05), ((1.96, 2.0, 2.1), 0.05)])
def test_how_far_from_the_target_is_said_of_the_furthest_seed_and_the_spread_is_over_steps_and_seeds(means, off):
    made = results(["dtopp"])
    for run, mean in zip(made.variants[0].runs, means, strict=True):
        run.training_active = {"target": 2.0, "mean": mean, "std": 0.3}
    [row] = summaries(made)
    assert row.off_target == pytest.approx(off) and row.training.mean == pytest.approx(np.mean(means))
    assert row.training.std == pytest.approx(math.hypot(0.3, np.std(means, ddof=1)))


def test_variants_of_another_objective_are_apart_and_told_from_the_first_s():
    groups = by_objective(results())
    assert [len(rows) for rows in groups.values()] == [11, 2]
    assert [row.label_of_all for row in groups["ddpm"]] == ["top-k (ddpm)", "DTop-p (ddpm)"]
    assert groups["flow"][1].label_of_all == "top-k"


def test_a_baseline_that_is_no_variant_is_refused():
    made = results(["dtopp"])
    made.variants[0].baseline = "topk"
    with pytest.raises(ValueError, match=r"dtopp\.baseline=topk is no variant; these are \['dtopp'\]"):
        summaries(made)
