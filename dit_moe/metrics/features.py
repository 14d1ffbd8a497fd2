"""Feature extractors: fixed networks, checked by the hash of their weights, whose features are compared."""

# N images, H height, W width, C channels, D feature width, K classes

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from dit_moe.registry import Registry

EXTRACTORS = Registry("feature extractor")


class Features(NamedTuple):
    """Features [N, D], float32 or float64, and, if the extractor classifies, logits [N, K]."""

    features_ND: Tensor
    logits_NK: Tensor | None = None


class FeatureExtractor(Protocol):
    """uint8 images [N, H, W, C] → `Features`, in batches of its own choosing; ValueError for images it cannot take.

    `name` stands in every result: it identifies the feature space, `sha256` the weights that span it.
    """

    name: str
    dim: int
    sha256: str

    def __call__(self, images_NHWC: np.ndarray) -> Features: ...
