"""What a classifier says of the images.

The Inception Score is high if it is sure of each image and its classes occur evenly, class accuracy if it takes the
images for the classes that they were made for.
"""

# N samples, K classes, B rows of a chunk

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dit_moe.config import require
from dit_moe.metrics.base import METRICS, FeatureSet, Metric

SPLIT = 5000  # images, ADM
CHUNK = 1024  # rows that are float64 at a time


class InceptionScore(NamedTuple):
    """In [1, K]: mean over splits, and standard deviation between them."""

    mean: float
    std: float


def inception_score(logits_NK: Tensor, split_size: int = SPLIT, device: torch.device | str = "cpu") -> InceptionScore:
    """exp E KL(p(class | image) ‖ p(class)) (Salimans et al. 2016) of each split, in float64.

    Splits are `split_size` images in the order given, the last one being what is left, as ADM's evaluator has them.
    ValueError for another shape or no images.
    """
    if logits_NK.ndim != 2 or not len(logits_NK):
        raise ValueError(f"logits have shape {tuple(logits_NK.shape)}; wanted [N, K] of at least one image")
    scores = [_score(split_NK, device) for split_NK in logits_NK.split(split_size)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def _score(logits_NK: Tensor, device: torch.device | str) -> float:
    """exp of E Σ p log p − Σ q log q with q = E p, which takes one pass over the images."""
    sums = []
    for chunk_BK in logits_NK.split(CHUNK):
        log_BK = chunk_BK.to(device, torch.float64).log_softmax(1)
        p_BK = log_BK.exp()
        sums.append(torch.cat([(p_BK * log_BK).sum()[None], p_BK.sum(0)]))
    negative_entropy, *_ = mean = torch.stack(sums).sum(0) / len(logits_NK)
    return (negative_entropy + torch.special.entr(mean[1:]).sum()).exp().item()


@dataclass(frozen=True, kw_only=True)
class InceptionScoreConfig:
    """Inception Score over splits."""

    split_size: int = SPLIT

    def __post_init__(self) -> None:
        require(self.split_size >= 1, self, "split_size", "must be at least 1")


@METRICS.register("inception_score", InceptionScoreConfig)
class InceptionScoreMetric(Metric):
    """`inception_score` and `inception_score_split_std`, of the samples alone."""

    config: InceptionScoreConfig
    needs: ClassVar[frozenset[str]] = frozenset()
    needs_of_samples: ClassVar[frozenset[str]] = frozenset({"logits_NK"})
    values = ("inception_score", "inception_score_split_std")
    better = "higher"

    def __call__(self, samples: FeatureSet, reference: FeatureSet) -> dict[str, float]:
        mean, std = inception_score(samples.finite("logits_NK"), self.config.split_size, self.device)
        return {"inception_score": mean, "inception_score_split_std": std}


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
    """`class_accuracy`, of the samples alone."""

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
