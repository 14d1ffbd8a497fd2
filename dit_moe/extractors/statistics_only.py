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
        stated: the `identity` that the files state, as far as they do; None if none does.
        dim: the width of their means.
        is_fid: whether that identity is the verified Inception's.
        has_spatial: whether all files have moments of spatial features, too.
    """

    def __init__(self, stated: Mapping[str, Any] | None, dim: int, is_fid: bool, has_spatial: bool) -> None:
        self.has_spatial, self.metrics = has_spatial, ("fd", "sfd") if has_spatial else ("fd",)
        self._stated = dict(stated or {"name": UNVERIFIED, "dim": dim, "sha256": ""})
        self.name, self.sha256, self.dim = self._stated["name"], self._stated["sha256"], dim
        self.is_fid = is_fid and stated is not None

    def identity(self) -> dict[str, str | int]:
        return self._stated

    def check(self, image_shape: tuple[int, int, int]) -> None:
        raise NotImplementedError("statistics have no images")

    def __call__(self, images_BCHW: Tensor) -> Features:
        raise NotImplementedError("statistics have no images")
