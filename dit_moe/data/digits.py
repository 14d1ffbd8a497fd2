"""Handwritten digits that come with scikit-learn: 1797 real 8×8 images of 10 classes, no download; enlarged on request.

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998 (`sklearn.datasets.load_digits`).
"""

# N images, B batch, S size in pixels

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_moe.config import require
from dit_moe.data.base import DATASETS, NoSuchSplit

SPLIT_SEED = 1797
PIXEL_MAX = 16
SIDE = 8  # pixels of the originals
ROUNDS = 32  # of `enlarge`


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """The split is no option: it is part of what the committed feature extractor was fitted on."""

    size: int = SIDE  # pixels; larger ones are smooth enlargements of the 8×8 originals

    def __post_init__(self) -> None:
        require(self.size >= SIDE and self.size % SIDE == 0, self, "size", f"must be a multiple of {SIDE}")

    @property
    def extractor(self) -> str:
        """The feature extractor that was made for them."""
        return "digits_cnn64"


@DATASETS.register("digits", DigitsConfig)
class Digits:
    """One split of the digits, held in memory.

    Args:
        config: the size.
        split: ``train`` (898 images), ``heldout`` (450, never trained on) or ``extractor`` (449, used for nothing
            but fitting the feature extractor of the metrics).

    Raises:
        ValueError: no such split, or a pixel that is NaN or outside 0..16.
    """

    class_names = tuple("0123456789")
    fingerprint = None  # nothing outside of this file decides what a row holds

    def __init__(self, config: DigitsConfig, split: str) -> None:
        raw = load_digits()
        parts = split_indices(raw.target)
        if split not in parts:
            raise NoSuchSplit("the digits", split, parts)
        images = enlarge(pixels_to_uint8(raw.images)[parts[split]], config.size)
        self.image_shape = (1, config.size, config.size)
        self._images_NCHW = torch.from_numpy(images)[:, None]
        self._labels_N = torch.from_numpy(raw.target[parts[split]].astype(np.int64))

    def __len__(self) -> int:
        return len(self._labels_N)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """{"images": uint8 [B, 1, S, S], "labels": int64 [B]}."""
        rows_B = torch.as_tensor(indices, dtype=torch.int64)
        return {"images": self._images_NCHW[rows_B], "labels": self._labels_N[rows_B]}

    def class_counts(self) -> list[int]:
        return self._labels_N.bincount(minlength=len(self.class_names)).tolist()


@cache
def load_digits() -> Any:
    """The one of scikit-learn, imported late: beside pandas it takes 140 MB, which only the digits need. Not to be
    written to: it is read once, as a study opens the digits for each of its runs."""
    from sklearn.datasets import load_digits

    return load_digits()


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


def enlarge(images_N88: np.ndarray, size: int) -> np.ndarray:
    """uint8 [N, 8, 8] → [N, S, S]: smooth images whose means over the area of each original pixel are that pixel.

    Bilinear interpolation, then `ROUNDS` corrections by what the means still lack (Irani & Peleg, Improving resolution
    by image registration, 1991). Plain bilinear or bicubic ones miss the means by 24 and 16 of 255 (rms), these by 0.8,
    so metrics that average back to 8×8 read what they read on the originals. Every sum is one of whole numbers below
    2^53, and so exact on every machine.
    """
    factor = size // SIDE
    if factor == 1:
        return images_N88
    weights_S8 = _bilinear(factor)
    sums_N88 = images_N88.astype(np.float64) * factor**2  # over the area of an original pixel
    images_NSS = np.zeros((len(images_N88), size, size))
    for correction in range(1 + ROUNDS):
        missing_N88 = sums_N88 - images_NSS.reshape(-1, SIDE, factor, SIDE, factor).sum((2, 4))
        share = min(1 + correction, 2) / (4 * factor**4)  # corrections by twice what is missing arrive sooner
        images_NSS = (images_NSS + np.rint(share * (weights_S8 @ missing_N88 @ weights_S8.T))).clip(0, 255)
    return images_NSS.astype(np.uint8)


def _bilinear(factor: int) -> np.ndarray:
    """Weights [S, 8] of the original pixels in each of S = 8·factor new ones, times 2·factor: whole numbers."""
    weights_S8 = np.zeros((SIDE * factor, SIDE))
    for i in range(SIDE * factor):
        left, right_weight = divmod(2 * i + 1 - factor, 2 * factor)  # centres are half a pixel in
        weights_S8[i, max(left, 0)] += 2 * factor - right_weight
        weights_S8[i, min(left + 1, SIDE - 1)] += right_weight
    return weights_S8
