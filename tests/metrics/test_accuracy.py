import pytest
import torch

from dit_moe.metrics import METRICS, FeatureSet
from dit_moe.metrics.accuracy import class_accuracy


def test_it_is_the_share_of_images_taken_for_their_label():
    assert class_accuracy(torch.eye(4), torch.tensor([0, 1, 3, 3])) == 0.75


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_outside_the_classes_is_refused_naming_the_source(label):
    metric = METRICS.build(METRICS.config_class("class_accuracy")())
    samples = FeatureSet("made.npz", 2, logits_NK=torch.eye(4)[:2], labels_N=torch.tensor([0, label]))
    with pytest.raises(ValueError, match=rf"made\.npz: label {label}; the extractor knows 4 classes"):
        metric(samples, samples)


def test_one_label_an_image_is_wanted():
    with pytest.raises(ValueError, match=r"labels of shape \(3,\) for 4 images"):
        class_accuracy(torch.eye(4), torch.zeros(3, dtype=torch.int64))
