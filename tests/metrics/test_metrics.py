"""What every registered metric promises. A new one is tested unasked."""

import json
import math
from dataclasses import replace

import pytest
import torch

from dit_moe.metrics import METRICS, FeatureMoments, FeatureSet, nearest_distances

IDEAL = {  # of a set against itself, all of whose images are taken for their labels, sure and evenly
    "fd": 0,
    "sfd": 0,
    "inception_score": 4,
    "precision": 1,
    "recall": 1,
    "density": 1,
    "coverage": 1,
    "class_accuracy": 1,
    "nearest_features": 0,
    "nearest_pixels": 0,
}
WHOLE = {"kid": {"subset_size": 40, "subsets": 2}}  # a subset that is all, for what must not depend on the order
everywhere = pytest.mark.parametrize("name", METRICS.names())


def images(seed, n=40, source="made.npz"):
    random = torch.Generator().manual_seed(seed)
    features_ND, spatial_NS = (torch.randn(n, d, generator=random) + 0.1 * seed for d in (6, 5))
    labels_N = torch.arange(n) % 4
    return FeatureSet(
        source=source,
        count=n,
        features_ND=features_ND,
        spatial_NS=spatial_NS,
        logits_NK=100 * torch.eye(4)[labels_N] + torch.randn(n, 4, generator=random),
        predictions_N=labels_N,
        labels_N=labels_N,
        thumbnails_NP=torch.randint(0, 256, (n, 12), generator=random, dtype=torch.uint8),
    )


def shuffled(each, seed=7):
    rows = torch.randperm(each.count, generator=torch.Generator().manual_seed(seed))
    names = ("features_ND", "spatial_NS", "logits_NK", "predictions_N", "labels_N", "thumbnails_NP")
    return replace(each, **{name: getattr(each, name)[rows] for name in names})


def build(name):
    return METRICS.build(METRICS.config_class(name)(**WHOLE.get(name, {})))


@everywhere
def test_values_are_finite_floats_under_the_documented_names_and_settings_json_ready(name):
    metric = METRICS.build(METRICS.config_class(name)())
    before = json.loads(json.dumps(metric.settings()))
    values = metric(images(0), images(1, n=50))
    assert metric.settings() == before
    promised = build(name).values
    assert values and (promised is None or [*values] == [key for key in promised if key != "kid_subset_std"])
    assert all(type(value) is float and math.isfinite(value) for value in values.values())


@everywhere
def test_the_order_of_the_images_does_not_matter(name):
    metric, samples, reference = build(name), images(0), images(1)
    expected = metric(samples, reference)
    # sums in another order
    assert metric(shuffled(samples), shuffled(reference, seed=8)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@everywhere
def test_a_set_against_itself_has_the_ideal_values(name):
    values = build(name)(images(0), shuffled(images(0)))
    for key in IDEAL.keys() & values.keys():
        assert values[key] == pytest.approx(IDEAL[key], rel=1e-12, abs=1e-9), key
    assert values.get("kid", 0) <= 0  # unbiased, so below 0 for sets nearer to each other than two draws are


@everywhere
@pytest.mark.parametrize("side, value", [("samples", torch.nan), ("reference", torch.inf), ("reference", -torch.inf)])
def test_values_that_are_not_finite_are_refused_naming_the_source_and_the_image(name, side, value):
    metric = METRICS.build(METRICS.config_class(name)())
    used = metric.needs | (metric.needs_of_samples if side == "samples" else set())
    field = {"moments": "features_ND", "spatial_moments": "spatial_NS"}
    used = [field.get(each, each) for each in used if each not in ("predictions_N", "labels_N")]
    sets = {"samples": images(0), "reference": images(1)}
    for tensor in used:
        broken = getattr(sets[side], tensor).clone()
        broken[3, 1] = value
        sets[side] = replace(sets[side], source="broken.npz", **{tensor: broken})
        with pytest.raises(ValueError, match=r"broken\.npz: sample 3 has NaN or infinity among its"):
            metric(sets["samples"], sets["reference"])


@everywhere
def test_it_works_with_what_it_says_it_needs_and_nothing_else(name):
    metric = build(name)
    moments = {"moments": "given_moments", "spatial_moments": "given_spatial_moments"}

    def bare(full, names):
        return FeatureSet(full.source, full.count, **{moments.get(n, n): getattr(full, n) for n in names})

    samples, reference = images(0), images(1)
    found = metric(bare(samples, metric.needs | metric.needs_of_samples), bare(reference, metric.needs))
    full = metric(samples, reference)
    assert found == {key: full[key] for key in found}


def test_moments_of_a_file_that_states_no_count_serve_the_frechet_distance():
    samples, full = images(0), images(1)
    given = FeatureMoments(None, full.moments.mean_D, full.moments.covariance())
    file = FeatureSet("reference.npz", None, given_moments=given)
    assert build("fd")(samples, file) == build("fd")(samples, full)
    wrong = FeatureSet("wrong.npz", None, given_moments=FeatureMoments(None, torch.zeros(3), torch.eye(3)))
    with pytest.raises(ValueError, match=r"made\.npz against wrong\.npz: moments of shape \(3,\)"):
        build("fd")(samples, wrong)
    broken = FeatureSet(
        "broken.npz", None, given_moments=FeatureMoments(None, given.mean_D * torch.nan, given.covariance_DD)
    )
    with pytest.raises(ValueError, match=r"made\.npz against broken\.npz: a mean holds NaN"):
        build("fd")(samples, broken)


def test_pixels_are_compared_only_where_both_sides_have_thumbnails():
    samples, reference = images(0), images(1)
    metric = build("nearest_neighbour")
    assert set(metric(samples, replace(reference, thumbnails_NP=None))) == {"nearest_features"}
    medians = metric(samples, reference)
    assert medians["nearest_pixels"] == nearest_distances(samples.thumbnails_NP, reference.thumbnails_NP).median()
    assert medians["nearest_features"] == nearest_distances(samples.features_ND, reference.features_ND).median()


@everywhere
def test_counts_are_checked_before_the_work_as_they_are_with_it(name):
    metric, refused = METRICS.build(METRICS.config_class(name)()), {}
    for counts in ((1, 40), (40, 1), (3, 40), (40, 3), (40, 40)):
        try:
            metric.check(*counts)
        except ValueError as error:
            refused[counts] = str(error)
            with pytest.raises(ValueError) as raised:
                metric(images(0, n=counts[0]), images(1, n=counts[1]))
            assert refused[counts] in str(raised.value)
    few = {"kid": {(1, 40), (40, 1)}, "precision_recall": {(1, 40), (40, 1), (3, 40), (40, 3)}}
    assert set(refused) == few.get(name, {(40, 1), (40, 3)} if name == "density_coverage" else set())


def test_pixels_and_classes_know_no_feature_space():
    outside = {
        value
        for name in METRICS.names()
        for value in build(name).values or ()
        if not build(name).in_feature_space(value)
    }
    assert outside == {"nearest_pixels", "class_accuracy"}


def test_it_is_said_which_way_each_is_better():
    better = {name: METRICS.build(METRICS.config_class(name)()).better for name in METRICS.names()}
    assert {name for name, way in better.items() if way == "lower"} == {"fd", "sfd", "kid"}
    assert {name for name, way in better.items() if way is None} == {"nearest_neighbour"}
    assert set(better.values()) == {"lower", "higher", None}
