"""Whether a classifier takes the images for the classes that they were made for."""

# N samples, K classes

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_moe.metrics.base import METRICS, FeatureSet, Metric


def class_accuracy(logits_NK: Tensor, labels_N: Tensor) -> float:
    """Share of images whose highest logit is that of their label.

    ValueError for other counts than one label an image, and for a label outside the K classes.
    """
    n, classes = logits_NK.shape
    if labels_N.shape != (n,) or n == 0:
        raise ValueError(f"labels of shape {tuple(labels_N.shape)} for {n} images; wanted one label for each")
    if labels_N.min() < 0 or labels_N.max() >= classes:
        wrong = int(labels_N.min() if labels_N.min() < 0 else labels_N.max())
        remedy = "leave class_accuracy out of --metrics, or choose an --extractor of these classes"
        raise ValueError(f"label {wrong}; the extractor knows {classes} classes, from 0 on; {remedy}")
    return (logits_NK.argmax(1) == labels_N).double().mean().item()


@dataclass(frozen=True, kw_only=True)
class ClassAccuracyConfig:
    """Share of samples that are taken for their label: no options."""


@METRICS.register("class_accuracy", ClassAccuracyConfig)
class ClassAccuracy(Metric):
    """`class_accuracy`. The reference has no part in it."""

    needs: ClassVar[frozenset[str]] = frozenset()
    needs_of_samples: ClassVar[frozenset[str]] = frozenset({"logits_NK", "labels_N"})
    better = "higher"

    def __call__(self, samples: FeatureSet, reference: FeatureSet) -> dict[str, float]:
        assert samples.labels_N is not None
        logits_NK = samples.finite("logits_NK")
        try:
            return {"class_accuracy": class_accuracy(logits_NK, samples.labels_N)}
        except ValueError as error:
            raise ValueError(f"{samples.source}: {error}") from None

    def in_feature_space(self, value: str) -> bool:
        return False
