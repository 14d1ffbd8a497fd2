"""What a feature extractor is: a fixed network, checked by the hash of its weights, whose features are compared."""

# B batch, N images, C channels, H height, W width, D feature width, S spatial feature width, K classes

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from dit_moe.registry import Registry

EXTRACTORS = Registry("feature extractor")
UNKNOWN_EXTRACTOR = "unverified"  # the name of the space of statistics that do not say which network made them


class Features(NamedTuple):
    """Features [B, D] and, from extractors that have them, spatial ones [B, S]; float32 or float64, on the CPU."""

    features_BD: Tensor
    spatial_BS: Tensor | None = None


class FeatureExtractor(ABC):
    """uint8 images → `Features`. An image's features depend on it alone, but for rounding."""

    name: str
    """The name of the feature space. The key of every number has it: ``fd_<name>``."""
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
    network: Any = None
    """The module that computes the features, if it is one."""
    device = torch.device("cpu")
    """Where features are computed."""

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
        self.device = torch.device(device)
        if self.network is not None:
            self.network.to(device)
        return self

    def identity(self) -> dict[str, str | int]:
        """All that decides its features, JSON-ready. Results record it; kept features are used only if it is equal."""
        return {"name": self.name, "dim": self.dim, "sha256": self.sha256}


def key_of(measure: str, extractor_name: str, is_fid: bool) -> str:
    """The name that a number of `measure` goes by: "fid" in the verified Inception's space, else "fd_<extractor>"."""
    if is_fid:
        return {"fd": "fid", "sfd": "sfid"}.get(measure, measure)
    return f"{measure}_{extractor_name}"


def require_colour(name: str, image_shape: tuple[int, int, int]) -> None:
    """ValueError, with a remedy, unless images have 3 channels."""
    if image_shape[0] != 3:
        problem = f"--extractor {name} takes images of 3 channels, not {image_shape[0]}"
        raise ValueError(f"{problem}; give --channels 3")


class StatisticsOnly(FeatureExtractor):
    """The feature space of files of statistics where there are no images; it cannot extract.

    Args:
        identity: of the extractor that the files name; None if none names one.
        dim: the width of their means.
        is_fid: whether that identity is the verified Inception's.
        has_spatial: whether all files have moments of spatial features, too.
    """

    def __init__(self, identity: Mapping[str, Any] | None, dim: int, is_fid: bool, has_spatial: bool) -> None:
        self.has_spatial, self.metrics = has_spatial, ("fd", "sfd") if has_spatial else ("fd",)
        self._identity = dict(identity or {"name": UNKNOWN_EXTRACTOR, "dim": dim, "sha256": ""})
        self.name, self.sha256, self.dim = self._identity["name"], self._identity["sha256"], dim
        self.is_fid = is_fid and identity is not None

    def identity(self) -> dict[str, str | int]:
        return self._identity

    def check(self, image_shape: tuple[int, int, int]) -> None:
        raise NotImplementedError("statistics have no images")

    def __call__(self, images_BCHW: Tensor) -> Features:
        raise NotImplementedError("statistics have no images")
