"""What arrays of images and labels must be, and what to do about those that are not."""

# N images, B images of a batch, C channels, H height, W width

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

CHANNELS = (1, 3)
BLOCK = 2**26  # bytes that are looked at together


class Rows(Protocol):
    """An array as far as its rows are concerned; it may lie in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, rows: Any) -> np.ndarray: ...


def require_images(images_NHWC: Rows, source: str) -> None:
    """ValueError, beginning with `source`, unless these are at least one image, uint8 with 1 or 3 channels.

    NaN and infinity are found before anything else is said of floats.
    """
    if np.issubdtype(images_NHWC.dtype, np.floating):
        for _ in extremes(images_NHWC, source):
            pass
    if images_NHWC.dtype != np.uint8:
        raise ValueError(f"{source}: images have dtype {images_NHWC.dtype}; save them as uint8 0..255")
    require_shape(images_NHWC.shape, source)


def require_shape(shape: tuple[int, ...], source: str) -> None:
    """ValueError, with what was probably meant, unless `shape` is [N, H, W, C] with 1 or 3 channels and without a 0."""
    if 0 in shape:
        raise ValueError(f"{source}: there is nothing in images of shape {shape}; sample at least 2")
    if len(shape) == 4 and shape[-1] in CHANNELS:
        return
    hint = ""
    if len(shape) == 4 and shape[1] in CHANNELS:
        hint = "; the channels seem to stand first: save images.transpose(0, 2, 3, 1)"
    elif len(shape) == 3:
        hint = "; an axis is missing: save grey images as images[..., None], a single image as image[None]"
    wanted = "wanted [N, height, width, channels] with 1 or 3 channels"
    raise ValueError(f"{source}: images have shape {shape}; {wanted}{hint}")


def extremes(images_NHWC: Rows, source: str) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(place of the first, least and greatest value of some images) until all were there.

    ValueError naming the first image that holds NaN or infinity.
    """
    for start, block in blocks(images_NHWC):
        if block.size == 0:
            continue
        values = np.atleast_1d(block)
        values = values.reshape(len(values), -1)
        lows, highs = values.min(1), values.max(1)  # NaN, where there is one
        finite = np.isfinite(lows) & np.isfinite(highs)
        if not finite.all():
            problem = f"image {start + int(finite.argmin())} holds NaN or infinity"
            raise ValueError(f"{source}: {problem}; find out why the sampler made it, it cannot be evaluated")
        yield start, lows, highs


def blocks(rows: Rows) -> Iterator[tuple[int, np.ndarray]]:
    """(place of the first, some rows) until all were there."""
    if not rows.shape:
        yield 0, rows[()]
        return
    step = max(1, BLOCK // max(1, int(np.prod(rows.shape[1:])) * rows.dtype.itemsize))
    for start in range(0, rows.shape[0], step):
        yield start, rows[start : start + step]


def require_labels(labels_N: np.ndarray | None, count: int, source: str) -> None:
    """ValueError, beginning with `source`, unless labels, if any, are one whole number ≥ 0 for each image."""
    if labels_N is None:
        return
    if labels_N.shape != (count,) or not np.issubdtype(labels_N.dtype, np.integer):
        found = f"labels are {labels_N.dtype} of shape {labels_N.shape}"
        raise ValueError(f"{source}: {found}; wanted one whole number for each of {count} images")
    if count and labels_N.min() < 0:
        problem = f"label {labels_N.min()} of image {labels_N.argmin()} is negative"
        raise ValueError(f"{source}: {problem}; classes count from 0")
