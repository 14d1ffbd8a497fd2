"""Whether a classifier takes the images for the classes that they were made for."""

# N samples

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_moe.metrics.base import METRICS, FeatureSet, Metric


def class_accuracy(predictions_N: Tensor, labels_N: Tensor) -> float:
    """Share of images that are taken for their label; both number the classes alike.

    ValueError for other counts than one label an image.
    """
    n = len(predictions_N)
    if predictions_N.shape != (n,) or labels_N.shape != (n,) or n == 0:
        found = f"labels of shape {tuple(labels_N.shape)} for predictions of shape {tuple(predictions_N.shape)}"
        raise ValueError(f"{found}; wanted one of each an image, and at least one image")
    return (predictions_N == labels_N).double().mean().item()


@dataclass(frozen=True, kw_only=True)
class ClassAccuracyConfig:
    """Share of samples that are taken for their label: no options."""


@METRICS.register("class_accuracy", ClassAccuracyConfig)
class ClassAccuracy(Metric):
    """`class_accuracy`. The reference has no part in it."""

    needs: ClassVar[frozenset[str]] = frozenset()
    needs_of_samples: ClassVar[frozenset[str]] = frozenset({"predictions_N", "labels_N"})
    values = ("class_accuracy",)
    better = "higher"

    def __call__(self, samples: FeatureSet, reference: FeatureSet) -> dict[str, float]:
        assert samples.predictions_N is not None and samples.labels_N is not None
        try:
            return {"class_accuracy": class_accuracy(samples.predictions_N, samples.labels_N)}
        except ValueError as error:
            raise ValueError(f"{samples.source}: {error}") from None

    def in_feature_space(self, value: str) -> bool:
        return False
