"""Handwritten digits that come with scikit-learn: 1797 real 8×8 images of 10 classes, no download.

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998 (`sklearn.datasets.load_digits`).
"""

# N images, B batch

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from dit_moe.data.base import DATASETS
from dit_moe.registry import did_you_mean

SPLIT_SEED = 1797
PIXEL_MAX = 16


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """The digits have no options: their split is part of what the committed feature extractor was fitted on."""


@DATASETS.register("digits", DigitsConfig)
class Digits:
    """One split of the digits, held in memory.

    Args:
        config: has no options.
        split: ``train`` (898 images), ``heldout`` (450, never trained on) or ``extractor`` (449, used for nothing
            but fitting the feature extractor of the metrics).

    Raises:
        ValueError: no such split, or a pixel that is NaN or outside 0..16.
    """

    class_names = tuple("0123456789")
    image_shape = (1, 8, 8)

    def __init__(self, config: DigitsConfig, split: str) -> None:
        raw = load_digits()
        parts = split_indices(raw.target)
        if split not in parts:
            raise ValueError(f"the digits have no split {split!r}; {did_you_mean(split, parts)}")
        images = pixels_to_uint8(raw.images)[parts[split]]
        self._images_NCHW = torch.from_numpy(images)[:, None]
        self._labels_N = torch.from_numpy(raw.target[parts[split]].astype(np.int64))

    def __len__(self) -> int:
        return len(self._labels_N)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """{"images": uint8 [B, 1, 8, 8], "labels": int64 [B]}."""
        rows_B = torch.as_tensor(indices, dtype=torch.int64)
        return {"images": self._images_NCHW[rows_B], "labels": self._labels_N[rows_B]}


def split_indices(labels_N: np.ndarray) -> dict[str, np.ndarray]:
    """The fixed split: of each class's images in random order, one in four is held out, one is the extractor's.

    The order comes from PCG64's raw stream, the only one of NumPy's that is promised never to change (NEP 19).
    """
    random_order = np.random.PCG64(SPLIT_SEED).random_raw(len(labels_N)).argsort(kind="stable")
    by_class = random_order[labels_N[random_order].argsort(kind="stable")]
    quarter = np.arange(len(labels_N)) % 4
    parts = {"train": quarter >= 2, "heldout": quarter == 0, "extractor": quarter == 1}
    return {name: np.sort(by_class[mine]) for name, mine in parts.items()}


def pixels_to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Grey levels 0..16 [N, …] → 0..255: v·255/16, halves rounded up, in whole numbers and so exact everywhere."""
    valid = (pixels >= 0) & (pixels <= PIXEL_MAX)  # false for NaN too
    if not valid.all():
        where = tuple(int(i) for i in np.argwhere(~valid)[0])
        raise ValueError(
            f"image {where[0]} of the digits has the pixel {pixels[where]} at {where[1:]}, which is not within "
            f"0..{PIXEL_MAX}; scikit-learn's copy of the data is damaged, reinstall it"
        )
    return ((pixels.astype(np.int64) * 255 + PIXEL_MAX // 2) // PIXEL_MAX).astype(np.uint8)
