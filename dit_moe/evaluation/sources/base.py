"""What can be evaluated: a numbered set of images, made or read on demand, and statistics that stand for one."""

# B batch, N images, C channels, H height, W width

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_moe.metrics import Moments

HOW = (  # of sample.json: how the images were made; when, where and how fast differs between equal ones
    *("run", "step", "weights_sha256", "experiment", "recipe", "evaluations"),
    *("parameters", "active_parameters", "active_experts", "thresholds"),
)


class Source(ABC):
    """N images. Image i is the same whatever is asked for beside it, in whatever order, by whichever process."""

    name: str
    """What messages and results call it."""
    image_shape: tuple[int, int, int]
    """(C, H, W) of all of them."""
    labels_N: Tensor | None = None
    """int64, in the order of the images."""
    batch_size: int | None = None
    """How many to ask for at a time, which decides rounding only; None: as one likes."""
    label_remedy: str = "save them as `labels` beside arr_0"
    """What gives it labels where it has none."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON-ready, with a ``kind``: all that decides the images, by hashes rather than by where it lies.

        Features kept on disk are held to it, and it stands in results. May read all of the images.
        """

    @abstractmethod
    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """uint8 images [B, C, H, W] of each part, a list of indices, in turn."""

    def facts(self) -> dict[str, Any]:
        """JSON-ready: what else a result should say of it, such as the run that made the images."""
        return {}

    def tally(self) -> dict[str, int]:
        """What was counted while `batches` made its images, since the last call: summed over all of them later."""
        return {}


@dataclass(frozen=True, eq=False)
class Statistics:
    """Moments of a file in place of images, and the feature space that they are in, as far as the file says."""

    source: str
    sha256: str  # of the numbers, not of the file: a zip holds times
    moments: Moments
    spatial_moments: Moments | None  # None: the file has none
    extractor: dict[str, Any] | None  # FeatureExtractor.identity(); None: the file does not say


@dataclass(frozen=True, eq=False)
class Opened:
    """One side of a comparison: images, statistics, or both (ADM's reference batches: statistics of many images, and
    some of the images). `heldout` are real images of the same kind, not among the others: they give the floor."""

    source: Source | None = None
    statistics: Statistics | None = None
    heldout: Source | None = None
    features: Path | None = None  # a folder of features that were made before, in place of all others


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How files of images are read; the command's options of the same names."""

    size: int | None = None  # crop and resize as ADM does; None: as they are, all of one size
    channels: int | None = None  # 3: repeat grey images; 1: grey of colour ones; None: as they are
    value_range: tuple[float, float] | None = None  # (lowest, highest) of float images; None: they are refused
    workers: int = 0  # processes that read and decode

    @property
    def changes(self) -> bool:
        """Whether images of any kind are made into others."""
        return self.size is not None or self.channels is not None

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"--size {self.size} is no size in pixels; give at least 1, or leave it out")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"--channels {self.channels}: images have 1 channel or 3; give one of them")
        low, high = self.value_range or (0.0, 1.0)
        if not -math.inf < low < high < math.inf:  # false for NaN, too
            raise ValueError(f"--range {low:g},{high:g} is empty or endless; give LOW,HIGH, for instance --range=-1,1")
        if self.workers < 0:
            raise ValueError(f"--workers {self.workers} is negative; give 0 to read in this process")


def sha256_of_labels(labels_N: Tensor | None) -> str | None:
    """For identities."""
    return None if labels_N is None else hashlib.sha256(labels_N.cpu().numpy().tobytes()).hexdigest()


def made_by(path: Path) -> dict[str, Any]:
    """Facts of a file or folder of images: where it is and, if `dit-moe sample` wrote it, how they were made."""
    facts: dict[str, Any] = {"path": str(path)}
    try:
        sample = json.loads((path.absolute().parent / "sample.json").read_text())
    except (OSError, ValueError):
        return facts
    listed = isinstance(sample, dict) and path.absolute().name in sample.get("files", ())
    return facts | ({"sample": {name: sample[name] for name in HOW if name in sample}} if listed else {})
