import numpy as np
import pytest
from sklearn.datasets import load_digits

from dit_moe.config import ConfigError
from dit_moe.data.digits import DigitsConfig, pixels_to_uint8, split_indices
from dit_moe.evaluate import EvalConfig, dataset_reference, evaluate, file_reference, with_reconstructions
from dit_moe.metrics import EXTRACTORS, ImageSet, write_images
from dit_moe.metrics.digits_cnn import DigitsCNNConfig


@pytest.fixture(scope="module")
def digits():
    """split → (images uint8 [N, 8, 8, 1], labels [N]), taken from scikit-learn directly."""
    raw = load_digits()
    images = pixels_to_uint8(raw.images)[..., None]
    return {name: (images[part], raw.target[part]) for name, part in split_indices(raw.target).items()}


def evaluate_digits(samples):
    """`evaluate` for (images, labels) of each sampling seed."""
    sets = [ImageSet(images, labels, f"samples of seed {i}") for i, (images, labels) in enumerate(samples)]
    return evaluate(sets, dataset_reference(DigitsConfig()), EXTRACTORS.build(DigitsCNNConfig()))


def noisy(pair, sigma, seed):
    images, labels = pair
    noise = np.random.default_rng(seed).normal(0, sigma, images.shape)
    return (images + noise).round().clip(0, 255).astype(np.uint8), labels


def distance(report):
    return report["fd_digits_cnn64"]


def test_real_images_reach_the_floor_and_noise_raises_the_ratio(digits):
    ratios = [
        distance(evaluate_digits([noisy(digits["heldout"], sigma, seed=0)]))["ratio"] for sigma in (0, 10, 25, 60)
    ]
    assert ratios[0] == pytest.approx(1) and ratios == sorted(ratios)
    assert ratios[2] > 3  # 4.0 when the extractor was made


def test_one_class_for_all_is_far_from_the_reference(digits):
    images, labels = digits["train"]
    assert (
        distance(evaluate_digits([(images[labels == 3], labels[labels == 3])]))["ratio"] > 30
    )  # 49 when the extractor was made


def test_copies_of_training_images_are_nearer_to_them_than_held_out_ones(digits):
    images, labels = digits["train"]
    nearest = evaluate_digits([(images[::2], labels[::2])])["nearest_neighbour"]
    for space in ("features", "pixels"):
        assert nearest[space]["generated"] == pytest.approx(0, abs=1e-11)  # features vary by rounding with the batch
        assert nearest[space]["heldout"] > 1


def test_accuracy_is_the_share_of_images_taken_for_their_label(digits):
    images, labels = digits["heldout"]
    half_wrong = np.where(np.arange(450) % 2, labels, (labels + 1) % 10)
    report = evaluate_digits([(images, labels), (images, half_wrong)])
    right = report["class_accuracy_heldout"]
    assert right == pytest.approx(448 / 450)
    assert report["class_accuracy"] == pytest.approx((right + right / 2) / 2, abs=0.005)


def test_seeds_are_averaged_and_their_spread_is_reported(digits):
    samples = [noisy(digits["heldout"], sigma=10, seed=seed) for seed in range(3)]
    together = distance(evaluate_digits(samples))
    single = [distance(evaluate_digits([each])) for each in samples]
    values = [each["generated"] for each in single]
    assert together["generated"] == pytest.approx(np.mean(values))
    assert together["generated_std"] == pytest.approx(np.std(values, ddof=1))
    assert together["ratio"] == pytest.approx(np.mean(values) / together["floor"])
    assert (together["n"], together["seeds"]) == (450, 3)
    assert single[0]["generated_std"] is None


@pytest.mark.parametrize("generated, expected", [(300, 300), (898, 450)])
def test_both_sides_are_compared_at_equal_n(digits, generated, expected):
    images, labels = digits["train"]
    report = evaluate_digits([(images[:generated], labels[:generated])])
    assert distance(report)["n"] == report["provenance"]["n_gen"] == expected
    fewer, all_of_them = distance(report)["floor"], distance(evaluate_digits([digits["heldout"]]))["floor"]
    assert fewer > all_of_them if expected < 450 else fewer == pytest.approx(all_of_them)


def test_the_result_says_what_it_was_made_from_and_that_it_is_no_fid(digits):
    report = evaluate_digits([digits["heldout"]])
    facts = report["provenance"]
    assert facts["extractor"] == "digits_cnn64" and facts["dim"] == 64 and len(facts["sha256"]) == 64
    assert (facts["n_gen"], facts["n_ref"], facts["reference"]) == (450, 898, "digits/train")
    assert facts["comparable_to_published"] is False
    assert not [key for key in report if "fid" in key.lower()]


def test_fewer_images_than_features_is_a_warning(digits):
    images, labels = digits["heldout"]
    assert evaluate_digits([(images[:64], labels[:64])])["warnings"] == []
    [warning] = evaluate_digits([(images[:63], labels[:63])])["warnings"]
    assert warning.startswith("63 images for 64 features")


def test_images_that_are_left_out_of_the_comparison_are_a_warning(digits):
    images, labels = digits["train"]
    most, fewer = (images[:600], labels[:600]), (images[:300], labels[:300])
    assert evaluate_digits([most])["warnings"] == [
        "600 images of a sampling seed thinned to 450, as many as digits/heldout has"
    ]
    assert evaluate_digits([most, fewer])["warnings"] == [
        "600 images of a sampling seed thinned to 300, as many as samples of seed 1 has"
    ]
    assert evaluate_digits([fewer, fewer])["warnings"] == []


def test_a_file_as_reference_gives_the_same_distance_but_no_measured_floor(digits, tmp_path):
    write_images(tmp_path / "reference.npz", digits["train"][0])
    extractor = EXTRACTORS.build(DigitsCNNConfig())
    samples = [ImageSet(*digits["heldout"])]
    by_file = evaluate(samples, file_reference(tmp_path / "reference.npz"), extractor)
    by_name = evaluate(samples, dataset_reference(DigitsConfig()), extractor)
    for key in ("generated", "floor_estimate"):
        assert distance(by_file)[key] == pytest.approx(distance(by_name)[key], rel=1e-12)
    assert distance(by_file)["floor"] is distance(by_file)["ratio"] is by_file["class_accuracy_heldout"] is None


def test_bad_samples_are_refused_naming_them(digits):
    images, labels = digits["heldout"]
    extractor, reference = EXTRACTORS.build(DigitsCNNConfig()), dataset_reference(DigitsConfig())
    refused = {
        "a.npz has no labels": ImageSet(images, None, "a.npz"),
        "a.npz has 1 image; .* at least 2": ImageSet(images[:1], labels[:1], "a.npz"),
        r"a.npz has images of \(4, 8, 1\)": ImageSet(images[:, :4], labels, "a.npz"),
        "a.npz has the label 10; the extractor knows 10 classes": ImageSet(images, labels + 1, "a.npz"),
    }
    for message, bad in refused.items():
        with pytest.raises(ValueError, match=message):
            evaluate([ImageSet(images, labels), bad], reference, extractor)
    with pytest.raises(ValueError, match="no samples"):
        evaluate([], reference, extractor)


def test_reconstructions_have_their_own_distance_between_the_floor_and_the_samples(digits):
    extractor, reference = EXTRACTORS.build(DigitsCNNConfig()), dataset_reference(DigitsConfig())
    lossy = with_reconstructions(reference, lambda images: images & 0b11110000)
    samples = [ImageSet(*noisy(digits["heldout"], 40, seed=0))]
    report = evaluate(samples, lossy, extractor)
    found, plain = distance(report), evaluate(samples, reference, extractor)
    assert found["floor"] < found["reconstruction"] < found["generated"]
    as_samples = [ImageSet(digits["heldout"][0] & 0b11110000, digits["heldout"][1])]
    assert found["reconstruction"] == pytest.approx(distance(evaluate(as_samples, reference, extractor))["generated"])
    assert found["reconstruction_ratio"] == pytest.approx(found["reconstruction"] / found["floor"])
    assert 0.9 < report["class_accuracy_reconstruction"] <= 1
    new = ("reconstruction", "reconstruction_ratio")
    assert distance(plain) == {key: None if key in new else value for key, value in found.items()}
    assert plain["class_accuracy_reconstruction"] is None


def test_a_perfect_reconstruction_is_at_the_floor(digits):
    reference = with_reconstructions(dataset_reference(DigitsConfig()), lambda images: images)
    assert np.array_equal(reference.reconstructed.images_NHWC, reference.heldout.images_NHWC)
    few = [ImageSet(digits["heldout"][0][:200], digits["heldout"][1][:200])]
    report = evaluate(few, reference, EXTRACTORS.build(DigitsCNNConfig()))
    assert distance(report)["reconstruction_ratio"] == pytest.approx(1)
    assert report["class_accuracy_reconstruction"] == report["class_accuracy_heldout"]


def test_a_reference_without_held_out_images_has_no_reconstructions(digits, tmp_path):
    write_images(tmp_path / "reference.npz", digits["train"][0])
    reference = file_reference(tmp_path / "reference.npz")
    assert with_reconstructions(reference, lambda images: images) is reference


@pytest.mark.parametrize("field, value", [("seeds", 0), ("images", 1)])
def test_a_config_that_gives_nothing_to_compare_is_refused(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value} must be at least"):
        EvalConfig(**{field: value})
