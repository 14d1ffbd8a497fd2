"""The feature space that files of statistics state, when there are no images left to look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dit_moe.extractors.base import FeatureExtractor, Features

UNVERIFIED = "unverified"  # what a space is called of which nobody knows by which network it was made


class StatedSpace(FeatureExtractor):
    """Stands for the extractor of statistics; it cannot extract.

    Args:
        stated: the `identity` that all of the files state; None if one of them does not, or they differ.
        dim: the width of their means.
        is_fid: whether that identity is the verified Inception's.
    """

    metrics = ("fd", "sfd")

    def __init__(self, stated: Mapping[str, Any] | None, dim: int, is_fid: bool) -> None:
        self._stated = dict(stated or {"name": UNVERIFIED, "dim": dim, "sha256": ""})
        self.name, self.sha256, self.dim = self._stated["name"], self._stated["sha256"], dim
        self.is_fid = is_fid and stated is not None

    def identity(self) -> dict[str, str | int]:
        return self._stated

    def check(self, image_shape: tuple[int, int, int]) -> None:
        raise ValueError(f"images of {image_shape} beside statistics alone; name an --extractor")

    def __call__(self, images_BCHW: Tensor) -> Features:
        raise NotImplementedError("statistics have no images")
