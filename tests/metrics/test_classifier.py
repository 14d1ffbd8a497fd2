import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from dit_moe.metrics import METRICS, FeatureSet
from dit_moe.metrics.classifier import inception_score


def logits(n, k, seed=0):
    return 3 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n, split_size", [(600, 60), (600, 600), (2500, 1250)])  # a split of more than one chunk
@pytest.mark.parametrize("k", [10, 1008])
def test_the_inception_score_equals_torch_fidelitys_unshuffled_on_equal_splits(n, split_size, k):
    each = logits(n, k)
    oracle = isc_features_to_metric(each, splits=n // split_size, shuffle=False)
    mean, std = inception_score(each, split_size)
    # both sum in float64, in another order
    assert mean == pytest.approx(oracle["inception_score_mean"], rel=1e-10)
    assert std == pytest.approx(oracle["inception_score_std"], abs=1e-10 * mean)


def test_the_inception_score_equals_the_formula_on_splits_in_order_the_last_one_partial():
    each, scores = logits(25, 7).double(), []
    for part in (each[:10], each[10:20], each[20:]):
        p = part.softmax(1)
        scores.append((p * (p / p.mean(0)).log()).sum(1).mean().exp().item())
    mean, std = inception_score(each, 10)
    assert mean == pytest.approx(sum(scores) / 3, rel=1e-12)
    assert std == pytest.approx((sum((s - mean) ** 2 for s in scores) / 3) ** 0.5, rel=1e-9)  # a small difference


def test_images_are_not_shuffled_so_sorted_classes_count_in_their_split_only():
    sure = 1000 * torch.eye(4)
    assert inception_score(sure.repeat(5, 1), split_size=4).mean == pytest.approx(4)
    assert inception_score(sure.repeat_interleave(4, 0), split_size=4).mean == pytest.approx(1)


def test_probabilities_that_underflow_count_as_nothing():
    assert inception_score(torch.tensor([[1e4, -1e4], [1e4, -1e4]])).mean == 1


def test_no_images_and_other_shapes_are_refused():
    for wrong in (torch.empty(0, 3), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"wanted \[N, K\]"):
            inception_score(wrong)


def test_splits_are_of_5000_images_unless_told():
    each, metric = logits(6000, 5), METRICS.build(METRICS.config_class("inception_score")())
    assert metric.settings() == {"split_size": 5000}
    expected = inception_score(each, 5000)
    assert inception_score(each) == expected and inception_score(each, 3000) != expected
    values = metric(FeatureSet("made.npz", 6000, logits_NK=each), FeatureSet("train", 1))
    assert values == {"inception_score": expected.mean, "inception_score_split_std": expected.std}


def test_logits_whose_order_may_be_another_than_the_labels_have_no_part_in_class_accuracy():
    predictions = torch.tensor([0, 1, 2, 3])
    samples = FeatureSet("made.npz", 4, logits_NK=torch.eye(4).flip(1), predictions_N=predictions, labels_N=predictions)
    metric = METRICS.build(METRICS.config_class("class_accuracy")())
    assert metric.needs_of_samples == {"predictions_N", "labels_N"} and "predictions_N" in samples.known
    assert metric(samples, samples) == {"class_accuracy": 1}
    assert torch.equal(samples.thinned(2).predictions_N, torch.tensor([0, 3]))


@pytest.mark.parametrize("predictions, labels", [(4, 3), (3, 4), (0, 0)])
def test_one_prediction_and_one_label_an_image_are_wanted_naming_the_source(predictions, labels):
    metric = METRICS.build(METRICS.config_class("class_accuracy")())
    counts = {"predictions_N": torch.zeros(predictions).long(), "labels_N": torch.zeros(labels).long()}
    with pytest.raises(ValueError, match=rf"made\.npz: labels of shape \({labels},\) for predictions of shape"):
        metric(FeatureSet("made.npz", predictions, **counts), FeatureSet("train", 1))
