"""What can be evaluated: a numbered set of images, made or read on demand, and statistics in place of images."""

# B batch, N images, C channels, H height, W width

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit_moe import config
from dit_moe.autoencoders import FirstStage
from dit_moe.data.images import crop
from dit_moe.data.listing import are_numbers, note
from dit_moe.distributed import join_processes
from dit_moe.json_files import read_object
from dit_moe.metrics import FeatureMoments
from dit_moe.sampling.outputs import OUTPUTS, SAMPLE_JSON
from dit_moe.training.config import MOST_WORKERS

if TYPE_CHECKING:
    from dit_moe.evaluation.features import FeatureFolder

IMAGES_FILE, PNG, GRID = (OUTPUTS[kind][0] for kind in ("npz", "png", "grid"))  # as `dit-moe sample` calls them
FEATURES_MANIFEST = "features.json"  # in a folder of features
MOST_PIXELS = 8192  # on a side
# Entries of sample.json that say how images were made. When, where and how fast they were made is left out.
SAMPLING_FACTS = (
    *("run", "step", "weights_sha256", "experiment", "recipe", "evaluations"),
    *("parameters", "active_parameters", "active_experts", "thresholds"),
)


class Source(ABC):
    """N images. Image i depends on i alone: not on the other images of a batch, their order, or the process."""

    name: str
    """What messages and results call it."""
    image_shape: tuple[int, int, int]
    """(C, H, W) of all of them."""
    labels_N: Tensor | None = None
    """int64, in the order of the images."""
    class_names: tuple[str, ...] | None = None
    """Of the labels 0, 1, …, where they are known."""
    model_classes: tuple[str, ...] | None = None
    """Of the model that makes the images, where they are known: its labels are never renumbered by `class_names`."""
    batch_size: int | None = None
    """How many to ask for at a time, which decides rounding only; None: any number."""
    label_remedy: str = "save them as `labels` beside arr_0"
    """How a user can add labels to images of this kind."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON-ready, with a ``kind``: all that decides the images, by hashes instead of paths. May read all images.

        Features kept on disk are used again only for images of the same identity, and results record it.
        """

    @abstractmethod
    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """uint8 images [B, C, H, W] of each part, a list of indices, in turn."""

    def facts(self) -> dict[str, Any]:
        """JSON-ready: what else a result should record, such as the run that made the images."""
        return {}

    def take_counts(self) -> dict[str, int]:
        """What was counted while `batches` made images, since the last call: to be summed over all images."""
        return {}


@dataclass(frozen=True, eq=False)
class Statistics:
    """Moments from a file in place of images, and the extractor of their features, if the file names it."""

    source: str
    sha256: str  # of the numbers, not of the file: a zip holds times
    moments: FeatureMoments
    spatial_moments: FeatureMoments | None  # None: the file has none
    extractor: dict[str, Any] | None  # FeatureExtractor.identity(); None: the file does not name it


@dataclass(frozen=True, eq=False)
class EvaluationInput:
    """Samples or a reference: images, statistics, or both (ADM's reference batches: statistics of many images and
    some of the images). `heldout` are real images of the same kind, not among the others: they give the floor."""

    source: Source | None = None
    statistics: Statistics | None = None
    heldout: Source | None = None
    no_heldout: str = "a reference that is no dataset names no held-out images"  # why there are none
    heldout_of_run: bool = False  # they are those of the run's own data, and were not named with the reference
    features: FeatureFolder | None = None  # that were made before, instead of all others

    @property
    def images(self) -> Source | FeatureFolder | None:
        """Where the number, shape, labels and origin of its images are known, if it has any."""
        return self.features if self.source is None else self.source


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How files of images are read; the command's options of the same names."""

    size: int | None = None  # crop and resize as ADM does; None: as they are, all of one size
    channels: int | None = None  # 3: repeat grey images; 1: grey of colour ones; None: as they are
    value_range: tuple[float, float] | None = None  # (lowest, highest) of float images; None: they are refused
    workers: int = 0  # processes that read and decode

    @property
    def changes(self) -> bool:
        """Whether images of any kind are resized or converted."""
        return self.size is not None or self.channels is not None

    def __post_init__(self) -> None:
        if self.size is not None and not 1 <= self.size <= MOST_PIXELS:
            raise ValueError(f"--size {self.size} must be from 1 to {MOST_PIXELS} pixels; or leave it out")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"--channels {self.channels}: images have 1 channel or 3; give one of them")
        low, high = self.value_range or (0.0, 1.0)
        if not -math.inf < low < high < math.inf:  # false for NaN, too
            raise ValueError(f"--range {low:g},{high:g} is empty or infinite; give LOW,HIGH, for instance --range=-1,1")
        if not 0 <= self.workers <= MOST_WORKERS:
            raise ValueError(f"--workers {self.workers} must be from 0, to read in this process, to {MOST_WORKERS}")


def sha256_of_labels(labels_N: Tensor | None) -> str | None:
    """For identities."""
    return None if labels_N is None else hashlib.sha256(labels_N.cpu().numpy().tobytes()).hexdigest()


def describe_sizes(sizes: Collection[tuple[int, int]]) -> str:
    """(width, height) of images, in a few words."""
    return "×".join(map(str, next(iter(sizes)))) if len(sizes) == 1 else "several sizes"


def sampled_into(folder: Path) -> dict[str, Any]:
    """What `dit-moe sample` says of the files in a folder, ``files`` being their names; there may be none."""
    found = read_object(folder / SAMPLE_JSON)
    return found if isinstance(found.get("files"), list) else {"files": []}


def facts_of_images(path: Path) -> dict[str, Any]:
    """Where a file or folder of images is and, if `dit-moe sample` wrote it, how the images were made."""
    facts: dict[str, Any] = {"path": str(path)}
    folder = path.resolve().parent
    sample = sampled_into(folder)
    if (folder / SAMPLE_JSON).is_file() and not read_object(folder / SAMPLE_JSON):
        note(f"{folder / SAMPLE_JSON} has no readable description: how the images were sampled is not known")
    if path.resolve().name not in sample["files"]:
        return facts
    return facts | {"sample": {name: sample[name] for name in SAMPLING_FACTS if name in sample}}


def label_by_name(given: EvaluationInput, reference: EvaluationInput | None) -> None:
    """Give the images the labels that classes of the same names have in the reference, if it names them all."""
    source, real = given.source, None if reference is None else reference.images
    while isinstance(source, ConvertedSource):
        source = source.source
    known = None if real is None else real.class_names
    if source is None or not source.class_names or not known or source.labels_N is None:
        return
    if not are_numbers(source.class_names) and set(source.class_names) <= set(known):
        label_C = torch.tensor([known.index(name) for name in source.class_names])
        source.labels_N, source.class_names = label_C[source.labels_N], known


# ---------------------------------------------------------------------------------------------- sources made of others


def converted(given: EvaluationInput, options: ReadOptions) -> EvaluationInput:
    """The same images, the held-out ones too, with the size and the number of channels that `options` asks for."""
    return replace(
        given,
        source=given.source and _converted(given.source, options),
        heldout=given.heldout and _converted(given.heldout, options),
    )


def _converted(source: Source, options: ReadOptions) -> Source:
    """`source` itself if nothing is to be changed."""
    found, height, width = source.image_shape
    size = None if options.size is None or options.size == height == width else options.size
    channels = None if options.channels in (None, found) else options.channels
    return ConvertedSource(source, size, channels) if size or channels else source


class ConvertedSource(Source):
    """The images of another source.

    Args:
        source: the images.
        size: ADM's centre crop to so many pixels square; None: as they are.
        channels: 3 repeats grey, 1 takes the luminance of colours; None: as they are.
    """

    def __init__(self, source: Source, size: int | None, channels: int | None) -> None:
        self.source, self.size, self.channels = source, size, channels
        self.name, self.batch_size, self.label_remedy = source.name, source.batch_size, source.label_remedy
        self.model_classes = source.model_classes
        found, height, width = source.image_shape
        self.image_shape = (channels or found, size or height, size or width)

    @property
    def labels_N(self) -> Tensor | None:  # type: ignore[override]
        return self.source.labels_N  # read when they are asked for

    @property
    def class_names(self) -> tuple[str, ...] | None:  # type: ignore[override]
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def identity(self) -> dict[str, Any]:
        changes = {"size": self.size, "channels": self.channels}
        return self.source.identity() | {"converted": {name: value for name, value in changes.items() if value}}

    def facts(self) -> dict[str, Any]:
        found, height, width = self.source.image_shape
        facts, changes = self.source.facts(), {}
        if self.size:
            changes["resized_from"] = describe_sizes([(width, height)])
        if self.channels:
            changes["converted"] = f"{found} to {self.channels} channels"
        return facts | {"stored": facts.get("stored", {}) | changes}

    def take_counts(self) -> dict[str, int]:
        return self.source.take_counts()

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        for images_BCHW in self.source.batches(parts):
            if self.size:
                images_BCHW = _resized(images_BCHW, self.size)
            if self.channels == 3:
                images_BCHW = images_BCHW.expand(-1, 3, -1, -1)
            elif self.channels == 1:
                images_BCHW = _luminance(images_BCHW)
            yield images_BCHW


def _resized(images_BCHW: Tensor, size: int) -> Tensor:
    """ADM's centre crop of uint8 images, [B, C, size, size]."""
    count, channels = images_BCHW.shape[:2]
    resized_BHWC = np.empty((count, size, size, channels), np.uint8)
    for resized, image in zip(resized_BHWC, images_BCHW.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
        picture = Image.fromarray(image.squeeze(-1) if channels == 1 else image)
        resized[:] = crop(picture, size).reshape(size, size, channels)
    return torch.from_numpy(resized_BHWC).permute(0, 3, 1, 2)


def _luminance(images_B3HW: Tensor) -> Tensor:
    """uint8 [B, 1, H, W]: ITU-R 601-2 in 16 bits and rounded, as Pillow makes grey of colours."""
    weights_C11 = torch.tensor((19595, 38470, 7471), device=images_B3HW.device).view(3, 1, 1)
    sums_B1HW = (images_B3HW.long() * weights_C11).sum(1, keepdim=True)
    return ((sums_B1HW + 0x8000) >> 16).to(torch.uint8)


class Thinned(Source):
    """n of the images, evenly spaced."""

    def __init__(self, images: Source, n: int) -> None:
        self.images, self.name, self.image_shape = images, f"{n} of {images.name}", images.image_shape
        self.rows = torch.linspace(0, len(images) - 1, n, dtype=torch.float64).round().long()
        self.labels_N = None if images.labels_N is None else images.labels_N[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def identity(self) -> dict[str, Any]:
        return {"kind": "thinned", "count": len(self), "images": self.images.identity()}

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        return self.images.batches([self.rows[list(part)].tolist() for part in parts])


class Reconstructed(Source):
    """Images, encoded and decoded, `at_a_time` together; None: as many as are asked for."""

    def __init__(self, images: Source, stage: FirstStage, at_a_time: int | None = None) -> None:
        self.images, self.stage, self.at_a_time = images, stage, at_a_time
        self.name = f"{images.name}, reconstructed"
        self.image_shape, self.labels_N = images.image_shape, images.labels_N

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> dict[str, Any]:
        stage: Any = self.stage.resolved()
        return {"kind": "reconstructed", "images": self.images.identity(), "first_stage": config.dump(stage)}

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        device = join_processes().device
        for images in self.images.batches(parts):
            few = images.split(self.at_a_time or len(images))
            with torch.no_grad():
                decoded = [self.stage.decode(self.stage.encode(each.to(device)).mean).cpu() for each in few]
            yield torch.cat(decoded)
