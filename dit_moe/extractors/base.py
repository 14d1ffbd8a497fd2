"""What a feature extractor is: a fixed network, checked by the hash of its weights, whose features are compared."""

# B batch, N images, C channels, H height, W width, D feature width, S spatial feature width, K classes

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Self

import torch
from torch import Tensor

from dit_moe.registry import Registry

EXTRACTORS = Registry("feature extractor")


class Features(NamedTuple):
    """Features [B, D] and, from extractors that have them, spatial ones [B, S]; float32 or float64, on the CPU."""

    features_BD: Tensor
    spatial_BS: Tensor | None = None


class FeatureExtractor(ABC):
    """uint8 images → `Features`. An image's features depend on it alone, but for rounding."""

    name: str
    """The feature space. It stands in the key of every number, ``fd_<name>``."""
    dim: int
    """D; 0 while that is not known."""
    sha256: str
    """Of the weights that span the space."""
    is_fid: bool = False
    """Whether a Fréchet distance here is *the* FID: the verified Inception network of 2015, and nothing else."""
    has_spatial: bool = False
    has_logits: bool = False
    classes: int | None = None
    """How many classes its logits have, if they are the labels of the data; None if they are in another order."""
    metrics: tuple[str, ...] = ("fd", "kid", "precision_recall", "nearest_neighbour")
    """What is measured in this space unless the user says otherwise; names of METRICS."""

    @abstractmethod
    def check(self, image_shape: tuple[int, int, int]) -> None:
        """ValueError, with a remedy, unless it takes images of this shape (C, H, W)."""

    @abstractmethod
    def __call__(self, images_BCHW: Tensor) -> Features:
        """Features of one batch of uint8 images, wherever it is; without gradients."""

    def logits(self, features_ND: Tensor) -> Tensor | None:
        """Class scores [N, K] that follow from features alone; None if it classifies nothing."""
        return None

    def to(self, device: torch.device | str) -> Self:
        """Compute on `device` from now on."""
        return self

    def identity(self) -> dict[str, str | int]:
        """All that decides its features, JSON-ready: stands in results, and features kept on disk are held to it."""
        return {"name": self.name, "dim": self.dim, "sha256": self.sha256}


def key_of(measure: str, extractor_name: str, is_fid: bool) -> str:
    """The name that a number of `measure` goes by: "fid" in the verified Inception's space, else "fd_<extractor>"."""
    if is_fid:
        return {"fd": "fid", "sfd": "sfid"}.get(measure, measure)
    return f"{measure}_{extractor_name}"
