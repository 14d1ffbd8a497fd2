"""Image sets in memory and as `images.npz`: ``arr_0`` uint8 [N, H, W, C] as ADM's evaluator reads, and ``labels``."""

# N images, H height, W width, C channels

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CHANNELS = (1, 3)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Checked images, with labels if there are any.

    Args:
        images_NHWC: uint8 0..255, at least one, 1 or 3 channels.
        labels_N: whole numbers ≥ 0, one per image, or None.
        source: where the images come from; error messages begin with it.
    """

    images_NHWC: np.ndarray
    labels_N: np.ndarray | None = None
    source: str = "images"

    def __post_init__(self) -> None:
        problem = _image_problem(self.images_NHWC) or _label_problem(self.labels_N, len(self.images_NHWC))
        if problem:
            raise ValueError(f"{self.source}: {problem}")

    def __len__(self) -> int:
        return len(self.images_NHWC)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C)."""
        return self.images_NHWC.shape[1:]

    def thinned(self, n: int) -> ImageSet:
        """n of the images, evenly spaced, so that the mix of classes stays, be they sorted, cyclic or shuffled."""
        rows = np.linspace(0, len(self) - 1, n).round().astype(int)
        labels_N = None if self.labels_N is None else self.labels_N[rows]
        return ImageSet(self.images_NHWC[rows], labels_N, self.source)


def _image_problem(images: np.ndarray) -> str | None:
    if np.issubdtype(images.dtype, np.floating) and not np.isfinite(images).all():
        bad = int(np.argwhere(~np.isfinite(images))[0][0])
        return f"image {bad} holds NaN or infinity; find out why the sampler made it, it cannot be evaluated"
    if images.dtype != np.uint8:
        return f"images have dtype {images.dtype}; save them as uint8 0..255"
    if images.ndim != 4 or images.shape[-1] not in CHANNELS:
        return f"images have shape {images.shape}; wanted [N, height, width, channels] with 1 or 3 channels"
    if images.size == 0:
        return f"there is nothing in images of shape {images.shape}; sample at least 2"
    return None


def _label_problem(labels: np.ndarray | None, n: int) -> str | None:
    if labels is None:
        return None
    if labels.shape != (n,) or not np.issubdtype(labels.dtype, np.integer):
        return f"labels are {labels.dtype} of shape {labels.shape}; wanted one whole number for each of {n} images"
    if labels.min() < 0:
        return f"label {labels.min()} of image {labels.argmin()} is negative; classes count from 0"
    return None


def read_images(path: str | Path) -> ImageSet:
    """Read `images.npz`, or the one in the folder `path`. Raises ValueError naming the file and what is wrong."""
    path = Path(path)
    file = path / "images.npz" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist; name an images.npz, or a folder that holds one")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in ("arr_0", "labels") if name in arrays}
            others = ", ".join(arrays)
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file} is not a readable npz of plain arrays: {error}") from None
    if "arr_0" not in found:
        raise ValueError(f"{file} has no array arr_0 but {others or 'none'}; save the images under that name")
    return ImageSet(found["arr_0"], found.get("labels"), str(file))
