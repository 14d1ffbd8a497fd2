import pytest
import torch

from dit_moe.metrics import METRICS, FeatureSet
from dit_moe.metrics.accuracy import class_accuracy


def test_it_is_the_share_of_images_taken_for_their_label():
    assert class_accuracy(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 3, 3])) == 0.75


def test_logits_whose_order_may_be_another_than_the_labels_have_no_part_in_it():
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
