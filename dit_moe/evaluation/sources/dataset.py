"""A registered dataset: the images that a model was trained on, and those that were held out."""

# B batch, N images, C channels, H height, W width

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dit_moe import config as configs
from dit_moe.data import DATASETS, BrokenImages, Dataset
from dit_moe.data.batch_sampler import load_batches
from dit_moe.data.image_source import ImageSource
from dit_moe.data.images import BadImage
from dit_moe.data.latents import LatentShards
from dit_moe.evaluation.sources.base import Opened, ReadOptions, Source, sha256_of_labels
from dit_moe.evaluation.sources.latents import LatentSource

# Where it lies, what only decides which images are refused, and what is not used here.
_FREE = ("path", "heldout", "id", "min_side", "max_megapixels", "flip", "fingerprint")
_TOGETHER = 256  # rows that are fetched for their labels, or to be hashed
READ_AT_MOST = 100_000  # images whose content is hashed: of ImageNet's it would be hours


def open_dataset(config: Any, split: str = "train", options: ReadOptions | None = None) -> Opened:
    """The images of a split, each once, be it mirrored in training or not; beside those of training the held-out ones.

    Encoded latents are decoded. A config that leaves the size open takes `options.size`.

    Raises what building the dataset raises. Without held-out images, or where those that the config names by default
    are not to be had, there are none.
    """
    options = options or ReadOptions()
    names = {field.name for field in fields(config)}
    if "flip" in names:
        config = replace(config, flip=False)
    if options.size and "size" in names and config.size is None:
        config = replace(config, size=options.size)
    source = _source(config, split, options)
    heldout = None
    if split == "train":
        try:
            heldout = _source(config, "heldout", options)
        except ValueError:
            if _states_heldout(config):
                raise
    return Opened(source, heldout=heldout)


def _source(config: Any, split: str, options: ReadOptions) -> Source:
    dataset = DATASETS.build(config, split)
    if isinstance(dataset, LatentShards):
        return LatentSource(dataset, name=f"{dataset.folder}, decoded")
    return DatasetSource(dataset, config, split, options.workers)


def _states_heldout(config: Any) -> bool:
    """Whether the config says where held-out images are; a default may not suit its data."""
    default = next((field.default for field in fields(config) if field.name == "heldout"), MISSING)
    return default is not MISSING and config.heldout not in (None, default)


class DatasetSource(Source):
    """The images of a dataset, in its order.

    Args:
        dataset: of images.
        config: what it was built from.
        split: of it.
        workers: processes that read ahead.
    """

    def __init__(self, dataset: Dataset, config: Any, split: str, workers: int = 0) -> None:
        self.dataset, self.config, self.split, self.workers = dataset, config, split, workers
        self.name = f"{DATASETS.name_of(config)}/{split}"
        self.image_shape = dataset.image_shape

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def labels_N(self) -> Tensor:  # type: ignore[override]
        if (known := getattr(self.dataset, "labels_N", None)) is not None:
            return torch.as_tensor(known, dtype=torch.int64)
        rows = range(len(self))
        parts = [rows[i : i + _TOGETHER] for i in range(0, len(rows), _TOGETHER)]
        return torch.cat([self.dataset.__getitems__(part)["labels"] for part in parts])

    def identity(self) -> dict[str, Any]:
        """Of the content of all images; of more than `READ_AT_MOST`, of their names, sizes and times of change.

        Reads them all, once. ValueError if one cannot be read.
        """
        config = {name: value for name, value in configs.dump(self.config).items() if name not in _FREE}
        identity = {"kind": "dataset", "name": DATASETS.name_of(self.config), "config": config, "split": self.split}
        labels_sha256 = sha256_of_labels(self.labels_N)
        return identity | {"sha256": self._sha256, "labels_sha256": labels_sha256, "count": len(self)}

    def facts(self) -> dict[str, Any]:
        listed = {"compared_by": "listing"} if self._is_large else {}
        return {"config": configs.dump(self.config), **listed}

    @property
    def _is_large(self) -> bool:
        return len(self) > READ_AT_MOST

    @cached_property
    def _sha256(self) -> str:
        digest, dataset = hashlib.sha256(), self.dataset
        if self._is_large:
            digest.update(str(dataset.fingerprint).encode())
            if isinstance(dataset, ImageSource):
                for stamp in dataset.stamps():
                    digest.update(b"%d %d " % stamp)
        elif isinstance(dataset, ImageSource):
            for image in range(len(self)):
                digest.update(hashlib.sha256(_content(dataset, image)).digest())
        else:
            rows = range(len(self))
            for images_BCHW in self.batches([rows[i : i + _TOGETHER] for i in range(0, len(rows), _TOGETHER)]):
                digest.update(images_BCHW.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Raises ValueError naming all images of a batch that are broken."""
        return images_of(self.dataset, parts, self.workers)


def _content(dataset: ImageSource, image: int) -> bytes:
    try:
        return dataset.read(image)
    except (OSError, BadImage) as error:
        problem = f"{dataset.locate(image)} cannot be read ({getattr(error, 'strerror', None) or error})"
        raise ValueError(f"{problem}; mend it, or take it out") from None


def images_of(dataset: Any, parts: Sequence[Sequence[int]], workers: int) -> Iterator[Tensor]:
    """The images of these rows, part by part. ValueError, with what helps here, for images that are broken."""
    try:
        for rows in load_batches(dataset, [list(part) for part in parts], workers):
            yield rows["images"]
    except BrokenImages as error:
        first, *others = dict.fromkeys(error.problems.values())
        more = f", and {len(others)} more" if others else ""
        raise ValueError(f"{first}{more}; mend what is broken, or take it out") from None
