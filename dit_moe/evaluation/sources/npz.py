"""An npz file as ADM's evaluator and `dit-moe sample` write it: images, statistics, or both."""

# N images, B images of a batch, C channels, H height, W width

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_moe.data.npz import NpzFile, Rows, extremes, require_images, require_labels, require_shape
from dit_moe.distributed import on_main
from dit_moe.evaluation.sources.base import EvaluationInput, ReadOptions, Source, facts_of_images, sha256_of_labels
from dit_moe.evaluation.sources.statistics import NAMES as STATISTICS
from dit_moe.evaluation.sources.statistics import statistics_of

IMAGES, LABELS = "arr_0", ("labels", "arr_1")  # of np.savez(file, images, labels), as ADM has them


def open_npz(path: str | Path, options: ReadOptions | None = None) -> EvaluationInput:
    """Images (``arr_0``, with ``labels`` or ``arr_1``), statistics (``mu``, ``sigma``), or both.

    Float images become uint8 if `options` gives their range: a value stands for the nearest of 256 levels, the lowest
    and the highest of which are the ends of the range. `options.size` and `channels` are left to `converted`.

    Raises ValueError, beginning with the file: not a readable npz, or what it holds cannot be evaluated.
    """
    file = NpzFile(Path(path))
    arrays = {name: file.read(name) for name in STATISTICS if name in file}
    statistics = statistics_of(arrays, str(path)) if {"mu", "sigma"} & arrays.keys() else None
    if IMAGES in file:
        return EvaluationInput(NpzSource(file, options or ReadOptions()), statistics)
    if statistics is None:
        wanted = f"save images as {IMAGES}, or statistics as mu and sigma"
        raise ValueError(f"{path} has no array {IMAGES} but {', '.join(file.names) or 'none'}; {wanted}")
    return EvaluationInput(statistics=statistics)


class NpzSource(Source):
    """The images of an npz."""

    def __init__(self, file: NpzFile, options: ReadOptions) -> None:
        self.file, self.name = file, str(file.path)
        self.images: Rows = file.array(IMAGES)
        self.range: tuple[float, float] | None = None
        if np.issubdtype(self.images.dtype, np.floating):
            self.range = options.value_range
            on_main(self._require_floats)  # reads all of them
        else:
            require_images(self.images, self.name)
        count, height, width, channels = self.images.shape
        self.image_shape = (channels, height, width)
        found = next((file.read(name) for name in LABELS if name in file), None)
        require_labels(found, count, self.name)
        self.labels_N = None if found is None else torch.from_numpy(found.astype(np.int64))

    def __len__(self) -> int:
        return self.images.shape[0]

    def identity(self) -> dict[str, Any]:
        """Of the images and labels as they are in the file, and of the range of floats. Reads them all, once."""
        identity = {
            "kind": "images",
            "sha256": self._sha256,
            "labels_sha256": sha256_of_labels(self.labels_N),
            "shape": list(self.images.shape),
            "dtype": str(self.images.dtype),
        }
        return identity | ({"range": list(self.range)} if self.range else {})

    def facts(self) -> dict[str, Any]:
        return facts_of_images(self.file.path)

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        for part in parts:
            found_BHWC = self.images[np.asarray(part, dtype=np.int64)]
            images_BHWC = found_BHWC if self.range is None else np.empty(found_BHWC.shape, np.uint8)
            if self.range is not None:
                for image, found in zip(images_BHWC, found_BHWC, strict=True):
                    image[:] = _levels(found, *self.range)
            yield torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).contiguous()

    @cached_property
    def _sha256(self) -> str:
        return self.file.sha256(IMAGES, self.images)

    def _require_floats(self) -> None:
        """ValueError unless all values are finite, and within the range once they are rounded to its levels."""
        problem: str | None = None
        for start, lows, highs in extremes(self.images, self.name):
            if self.range is None or problem is not None:
                continue
            outside = (_levels(lows, *self.range) < 0) | (_levels(highs, *self.range) > 255)
            if outside.any():
                bad = int(outside.argmax())
                problem = f"image {start + bad} has values from {lows[bad]:g} to {highs[bad]:g}"
        require_shape(self.images.shape, self.name)
        if self.range is None:
            wanted = "save them as uint8 0..255, or say what is black and white, for instance --range=-1,1"
            raise ValueError(f"{self.name}: images have dtype {self.images.dtype}; {wanted}")
        if problem is not None:
            given = f"outside of --range={self.range[0]:g},{self.range[1]:g}"
            remedy = "give the range that the sampler means, or clip them"
            raise ValueError(f"{self.name}: {problem}, {given}; {remedy}")


def _levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Whole levels of grey, 0 at `low` and 255 at `high`; halves go up, as where first stages make uint8 of floats."""
    return np.floor((values.astype(np.float64) - low) * (255 / (high - low)) + 0.5)
