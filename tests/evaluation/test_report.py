"""Reports on the digits: real ones against each other, noisy ones, copies."""

import json
import re
from functools import cache
from importlib.metadata import version

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from dit_moe.config import ConfigError
from dit_moe.data.digits import pixels_to_uint8, split_indices
from dit_moe.evaluation.compute import compute_report, number_names
from dit_moe.evaluation.features import ExtractedFeatures
from dit_moe.evaluation.report import Report
from dit_moe.experiments.image import EvalConfig
from dit_moe.extractors import EXTRACTORS
from dit_moe.extractors.digits_cnn import DigitsCNNConfig
from dit_moe.metrics import METRICS, FeatureMoments, FeatureSet, configs_of, expected_floor

EXTRACTOR = EXTRACTORS.build(DigitsCNNConfig())


@pytest.fixture(scope="module")
def digits():
    """split → (images uint8 [N, 1, 8, 8], labels [N]), taken from scikit-learn directly."""
    raw = load_digits()
    images = pixels_to_uint8(raw.images)[:, None]
    return {name: (images[part], raw.target[part]) for name, part in split_indices(raw.target).items()}


@cache
def features_of(pixels: bytes):
    return EXTRACTOR(torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, 1, 8, 8)).features_BD


def of(pair, name="samples"):
    images, labels = pair
    images_NCHW = torch.from_numpy(np.ascontiguousarray(images))
    features_ND = features_of(images.tobytes())
    features = FeatureSet(
        name,
        len(images),
        features_ND=features_ND,
        logits_NK=EXTRACTOR.logits(features_ND),
        predictions_N=EXTRACTOR.logits(features_ND).argmax(1),
        labels_N=None if labels is None else torch.from_numpy(labels),
        thumbnails_NP=images_NCHW.flatten(1),
    )
    return ExtractedFeatures(features, {"kind": "digits", "name": name}, {"name": name})


def evaluate(*args, **others):
    """A report as metrics.json holds it."""
    return compute_report(*args, **others).to_json()


def against_train(digits, *samples, **others):
    """For (images, labels) of each sampling seed, against the training images; the Fréchet distance, unless told."""
    sets = [of(each, f"seed {i}") for i, each in enumerate(samples)]
    others = {"heldout": of(digits["heldout"], "heldout"), "metrics": configs_of(["fd"])} | others
    return evaluate(sets, of(digits["train"], "train"), EXTRACTOR, **others)


def noisy(pair, sigma, seed):
    images, labels = pair
    noise = np.random.default_rng(seed).normal(0, sigma, images.shape)
    return (images + noise).round().clip(0, 255).astype(np.uint8), labels


def distance(report):
    return report["fd_digits_cnn64"]


def test_real_images_reach_the_floor_and_noise_raises_the_ratio(digits):
    noisier = (noisy(digits["heldout"], sigma, seed=0) for sigma in (0, 10, 25))
    ratios = [distance(against_train(digits, each))["ratio"] for each in noisier]
    assert ratios[0] == pytest.approx(1) and ratios == sorted(ratios)
    assert ratios[2] > 3  # 4.0 when the extractor was made


def test_one_class_for_all_is_far_from_the_reference_and_covers_little_of_it(digits):
    images, labels = digits["train"]
    threes = images[labels == 3], labels[labels == 3]
    report = against_train(digits, threes, metrics=configs_of(["fd", "precision_recall"]))
    assert distance(report)["ratio"] > 30  # 49 when the extractor was made
    assert report["precision_digits_cnn64"] > 0.9 and report["recall_digits_cnn64"] < 0.3


def test_copies_of_training_images_are_nearer_to_them_than_held_out_ones(digits):
    images, labels = digits["train"]
    report = against_train(digits, (images[::2], labels[::2]), metrics=configs_of(["nearest_neighbour"]))
    for name in ("nearest_features_digits_cnn64", "nearest_pixels"):
        assert report[name] == pytest.approx(0, abs=1e-11)  # features vary by rounding with the batch
        assert report[f"{name}_heldout"] > 1


def test_accuracy_is_the_share_of_images_taken_for_their_label(digits):
    images, labels = digits["heldout"]
    half_wrong = np.where(np.arange(450) % 2, labels, (labels + 1) % 10)
    report = against_train(digits, (images, labels), (images, half_wrong), metrics=configs_of(["class_accuracy"]))
    right = report["class_accuracy_heldout"]
    assert right == pytest.approx(448 / 450)
    assert report["class_accuracy"] == pytest.approx((right + right / 2) / 2, abs=0.005)


@pytest.mark.parametrize(
    ("samples", "heldout", "warned"),
    [
        ("held", "held", None),
        ("wrong", "held", r"class_accuracy: 0\.\d+ is about what guessing gets, 0\.1: the samples do not show"),
        ("wrong", None, r"class_accuracy: 0\.\d+ is about what guessing"),
        ("held", "wrong", r"class_accuracy: of held-out images, .*, 0\.1: digits_cnn64 cannot judge these classes"),
    ],
)
def test_a_class_accuracy_near_chance_is_a_warning(digits, samples, heldout, warned):
    images, labels = digits["heldout"]
    sets = {"held": (images, labels), "wrong": (images, np.roll(labels, 1)), None: None}
    given = {"metrics": configs_of(["class_accuracy"]), "heldout": heldout and of(sets[heldout])}
    warnings = against_train(digits, sets[samples], **given)["warnings"]
    assert len(warnings) == (warned is not None) and all(re.match(warned, each) for each in warnings)


def test_seeds_are_averaged_and_their_spread_is_reported(digits):
    samples = [noisy(digits["heldout"], sigma=10, seed=seed) for seed in range(3)]
    metrics = configs_of(["fd", "class_accuracy"])
    together = against_train(digits, *samples, metrics=metrics)
    single = [against_train(digits, each, metrics=metrics) for each in samples]
    values = [distance(each)["generated"] for each in single]
    assert distance(together)["generated"] == pytest.approx(np.mean(values))
    assert distance(together)["generated_std"] == pytest.approx(np.std(values, ddof=1))
    assert distance(together)["ratio"] == pytest.approx(np.mean(values) / distance(together)["floor"])
    assert (distance(together)["n"], distance(together)["seeds"]) == (450, 3)
    assert distance(single[0])["generated_std"] is None
    accuracies = [each["class_accuracy"] for each in single]
    assert together["class_accuracy"] == pytest.approx(np.mean(accuracies))
    assert together["class_accuracy_std"] == pytest.approx(np.std(accuracies, ddof=1))


@pytest.mark.parametrize("generated, expected", [(300, 300), (898, 450)])
def test_both_sides_are_compared_at_equal_n(digits, generated, expected):
    images, labels = digits["train"]
    report = against_train(digits, (images[:generated], labels[:generated]))
    assert distance(report)["n"] == report["provenance"]["n_gen"] == expected
    facts = report["provenance"]
    assert (distance(report)["n_reference"], facts["n_ref_images"], facts["n_ref_statistics"]) == (898, 898, 898)
    fewer, all_of_them = distance(report)["floor"], distance(against_train(digits, digits["heldout"]))["floor"]
    assert fewer > all_of_them if expected < 450 else fewer == pytest.approx(all_of_them)


def test_the_result_says_what_it_was_made_from_and_that_it_is_no_fid(digits):
    report = against_train(digits, digits["heldout"], metrics=configs_of(["fd", "kid"]))
    facts = report["provenance"]
    extractor = {"name": "digits_cnn64", "dim": 64, "is_fid": False}
    assert facts["extractor"].items() >= extractor.items() and len(facts["extractor"]["sha256"]) == 64
    assert facts["samples"] == [{"name": "seed 0"}] and facts["reference"] == {"name": "train"}
    assert facts["metrics"]["kid"] and facts["versions"]["torch"] == version("torch")
    assert not [key for key in report if "fid" in key.lower()]
    json.dumps(report, allow_nan=False)


def test_only_in_the_verified_inceptions_space_is_the_distance_the_fid_and_names_stand_alone(digits):
    class Verified(type(EXTRACTOR)):
        name, is_fid = "inception", True

    sets, metrics = ([of(digits["heldout"])], of(digits["train"])), configs_of(["fd", "kid"])
    report = evaluate(*sets, Verified(DigitsCNNConfig()), metrics)
    same = evaluate(*sets, EXTRACTOR, metrics)
    assert report["fid"]["generated"] == distance(same)["generated"]
    assert report["kid"] == same["kid_digits_cnn64"] and not [key for key in report if "inception" in key]
    unknown = evaluate(*sets, Verified(DigitsCNNConfig()), configs_of(["fd"]), space="unverified")
    assert unknown["fd_unverified"]["generated"] == report["fid"]["generated"] and "fid" not in unknown
    assert unknown["provenance"]["extractor"]["is_fid"] is False


def test_too_few_images_and_images_left_out_of_the_comparison_are_warnings(digits):
    def warnings(*counts, split="train"):
        images, labels = digits[split]
        return against_train(digits, *[(images[:n], labels[:n]) for n in counts])["warnings"]

    assert warnings(64, split="heldout") == warnings(300, 300) == []
    [warning] = warnings(63, split="heldout")
    assert warning.startswith("63 images for 64 features")
    assert warnings(600) == ["600 images of seed 0 thinned to 450, as many as heldout has"]
    assert warnings(600, 300) == ["600 images of seed 0 thinned to 300, as many as seed 1 has"]


def test_a_reference_without_held_out_images_gives_the_same_distance_but_no_measured_floor(digits):
    metrics = configs_of(["fd", "class_accuracy"])
    without, with_them = (
        against_train(digits, digits["heldout"], metrics=metrics, **others) for others in ({"heldout": None}, {})
    )
    for key in ("generated", "floor_estimate"):
        assert distance(without)[key] == distance(with_them)[key]
    assert distance(without)["floor"] is distance(without)["ratio"] is without["class_accuracy_heldout"] is None


def statistics(pair, n):
    moments = of(pair).features.moments
    given = FeatureMoments(n, moments.mean_D, moments.covariance())
    return ExtractedFeatures(FeatureSet("given.npz", n, given_moments=given), {}, {"name": "given.npz"})


@pytest.mark.parametrize("n_reference", [898, 2000, None])
def test_statistics_as_reference_give_the_same_distance_a_floors_estimate_of_both_counts_and_no_kid(
    digits, n_reference
):
    reference, samples = statistics(digits["train"], n_reference), [of(digits["heldout"])]
    report = evaluate(samples, reference, EXTRACTOR, configs_of(["fd", "class_accuracy"]))
    found, covariance = distance(report), reference.features.moments.covariance()
    assert found["generated"] == pytest.approx(distance(against_train(digits, digits["heldout"]))["generated"])
    assert report["class_accuracy"] > 0.9 and report["provenance"]["n_ref_images"] is None
    assert found["n_reference"] == n_reference
    assert found["floor_estimate"] == expected_floor(covariance, 450, n_reference)
    assert found["floor_estimate"] < expected_floor(covariance, 450, 450)
    with pytest.raises(ValueError, match=r"kid needs images, and given.npz .*leave kid out of --metrics"):
        evaluate(samples, reference, EXTRACTOR, configs_of(["kid"]))
    with pytest.raises(ValueError, match=r"sfd needs spatial features.*mu_s.*--save-stats"):
        evaluate(samples, reference, EXTRACTOR, configs_of(["sfd"]))


@pytest.mark.parametrize("n, floor", [(300, True), (898, False), (None, False)])
def test_statistics_as_samples_have_no_other_count_than_their_own(digits, n, floor):
    sides = [statistics(digits["train"], n)], of(digits["train"])
    report = evaluate(*sides, EXTRACTOR, configs_of(["fd"]), heldout=of(digits["heldout"], "heldout"))
    assert distance(report)["n"] == report["provenance"]["n_gen"] == n
    assert (distance(report)["floor"] is not None) == (distance(report)["ratio"] is not None) == floor
    assert not [note for note in report["warnings"] if "thinned" in note]


def test_what_looks_at_one_set_alone_sees_all_of_it(digits):
    images, labels = digits["train"]
    report = against_train(digits, (images, labels), metrics=configs_of(["fd", "inception_score"]))
    alone = METRICS.build(METRICS.config_class("inception_score")())(of((images, labels)).features, None)
    assert distance(report)["n"] == 450
    assert report["inception_score_digits_cnn64"] == alone["inception_score"]


def test_bad_samples_are_refused_naming_them(digits):
    images, labels = digits["heldout"]
    accuracy = configs_of(["class_accuracy"])
    with pytest.raises(ValueError, match="class_accuracy needs labels, and seed 1 has none"):
        against_train(digits, (images, labels), (images, None), metrics=accuracy)
    with pytest.raises(ValueError, match="no samples"):
        against_train(digits)


def test_reconstructions_have_their_own_distance_between_the_floor_and_the_samples(digits):
    images, labels = digits["heldout"]
    coarse = (images & 0b11110000, labels)
    samples = noisy(digits["heldout"], 40, seed=0)
    metrics = configs_of(["fd", "class_accuracy"])
    report = against_train(digits, samples, reconstructed=of(coarse), metrics=metrics)
    plain = against_train(digits, samples, metrics=metrics)
    found = distance(report)
    assert found["floor"] < found["reconstruction"] < found["generated"]
    assert found["reconstruction"] == distance(against_train(digits, coarse))["generated"]
    assert found["reconstruction_ratio"] == pytest.approx(found["reconstruction"] / found["floor"])
    assert 0.9 < report["class_accuracy_reconstruction"] <= 1
    new = ("reconstruction", "reconstruction_ratio")
    assert distance(plain) == {key: value for key, value in found.items() if key not in new}
    assert "class_accuracy_reconstruction" not in plain


@pytest.mark.parametrize(
    "field, value", [("seeds", 0), ("images", 1), ("metrics", ()), ("light_every", 0), ("light_images", 1)]
)
def test_a_config_that_gives_nothing_to_compare_is_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        EvalConfig(**{field: value})


@pytest.mark.parametrize("heldout, coarse, seeds", [(False, False, 1), (True, False, 2), (True, True, 1)])
def test_the_numbers_of_a_report_are_known_before_it_is_made(digits, heldout, coarse, seeds):
    metrics = configs_of(EXTRACTOR.metrics)
    others = {"heldout": of(digits["heldout"]) if heldout else None}
    others["reconstructed"] = of((digits["heldout"][0] & 0b11110000, digits["heldout"][1])) if coarse else None
    samples = [of(noisy(digits["heldout"], 10, seed)) for seed in range(seeds)]
    report = compute_report(samples, of(digits["train"]), EXTRACTOR, metrics, **others)
    names = number_names(EXTRACTOR, metrics, heldout=heldout, reconstructed=coarse, seeds=seeds)
    assert set(report.flat()) == set(names) - {"kid_subset_std_digits_cnn64"}  # only of subsets that do not overlap


def test_a_report_is_read_as_it_was_written(digits):
    report = compute_report([of(digits["heldout"])], of(digits["train"]), EXTRACTOR, configs_of(EXTRACTOR.metrics))
    tree = {**report.to_json(), "active_experts": 2.0}
    assert json.dumps(Report.from_json(json.loads(json.dumps(tree))).to_json()) == json.dumps(tree)
