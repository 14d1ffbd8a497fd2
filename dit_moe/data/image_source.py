"""What all datasets of image files share: their options, mirrored rows, and the report of broken files."""

# N images, B rows of a batch, U different images among them, C channels, H height, W width

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_moe.config import require
from dit_moe.data.base import BrokenImages
from dit_moe.data.images import BadImage, decode
from dit_moe.registry import did_you_mean


@dataclass(frozen=True, kw_only=True)
class ImageSourceConfig:
    """The options that all sources of images have."""

    heldout: str | None = None  # where the images of the split `heldout` are
    size: int | None = None  # ADM's centre crop to so many pixels square; None: as they are, all of one size
    flip: bool = False  # in training, row N + i is image i mirrored, so that an epoch shows both
    min_side: int = 8  # pixels; an image with less is refused
    max_megapixels: float = 200.0  # an image with more is refused before it is decoded
    fingerprint: str | None = None  # (recorded) of what the files hold

    def __post_init__(self) -> None:
        require(self.size is None or self.size >= 1, self, "size", "must be at least 1, or null to keep images whole")
        require(self.min_side >= 1, self, "min_side", "must be at least 1")
        require(self.max_megapixels > 0, self, "max_megapixels", "must be above 0")


class ImageSource(ABC):
    """Base class of datasets of image files. A source says where bytes and labels come from.

    Args:
        config: its options.
        split: only ``train`` is mirrored.
        labels_N: int64.
        class_names: of the labels 0, 1, …
        fingerprint: of what the files hold.
    """

    def __init__(
        self, config: ImageSourceConfig, split: str, labels_N: np.ndarray, class_names: Sequence[str], fingerprint: str
    ) -> None:
        self.config, self.labels_N = config, labels_N
        self.class_names, self.fingerprint = tuple(class_names), fingerprint
        self.ways = 2 if config.flip and split == "train" else 1

    @abstractmethod
    def read(self, image: int) -> bytes:
        """The file of an image. OSError or BadImage if that cannot be had."""

    @abstractmethod
    def locate(self, image: int) -> str:
        """Where an image is, for messages."""

    def stamps(self) -> Iterable[tuple[int, int]]:
        """(bytes, time of change in ns) of every file, as far as files can be told apart."""
        return ()

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        return (3, size, size) if (size := self.config.size) else self._first[1]

    def __len__(self) -> int:
        return self.ways * len(self.labels_N)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """{"images": uint8 [B, 3, H, W], "labels": int64 [B]}.

        Raises:
            BrokenImages: all images of the batch that cannot be used.
            ValueError: without `size`, images of different sizes.
        """
        rows_B = np.asarray(indices, dtype=np.int64)
        assert rows_B.size == 0 or 0 <= rows_B.min() <= rows_B.max() < len(self), "indices lie within the data set"
        way_B, image_B = np.divmod(rows_B, len(self.labels_N))
        image_U, where_B = np.unique(image_B, return_inverse=True)
        images_UCHW = np.empty((len(image_U), *self.image_shape), dtype=np.uint8)
        problems: dict[int, str] = {}
        for i, image in enumerate(image_U.tolist()):
            try:
                images_UCHW[i] = self._pixels(image)
            except BadImage as error:
                problems |= dict.fromkeys(rows_B[where_B == i].tolist(), str(error))
        if problems:
            raise BrokenImages(problems)
        images_BCHW, mirrored_B = torch.from_numpy(images_UCHW[where_B]), torch.from_numpy(way_B == 1)
        images_BCHW[mirrored_B] = images_BCHW[mirrored_B].flip(-1)
        return {"images": images_BCHW, "labels": torch.from_numpy(self.labels_N[image_B])}

    def class_counts(self) -> list[int]:
        return np.bincount(self.labels_N, minlength=len(self.class_names)).tolist()

    def _pixels(self, image: int) -> np.ndarray:
        """uint8 [C, H, W]. BadImage names the file; ValueError if it is not as large as the first one."""
        pixels_CHW = self._decoded(image)
        if self.config.size is None and pixels_CHW.shape != self.image_shape:
            first, (_, height, width) = self._first
            found = f"{self.locate(image)} is {pixels_CHW.shape[2]}×{pixels_CHW.shape[1]}"
            problem = f"{found}, and {self.locate(first)} {width}×{height}"  # no key: it may be read in any section
            raise ValueError(f"{problem}; set size in their section to make them one")
        return pixels_CHW

    def _decoded(self, image: int) -> np.ndarray:
        limits = self.config
        try:
            return decode(self.read(image), limits.size, limits.min_side, limits.max_megapixels)
        except OSError as error:
            problem = f"cannot be read ({error.strerror or error})"
        except BadImage as error:
            problem = str(error)
        raise BadImage(f"{self.locate(image)} {problem}")

    @cached_property
    def _first(self) -> tuple[int, tuple[int, int, int]]:
        """The first image that is not broken, whose size all must have if they are kept as they are; its shape."""
        problems: dict[int, str] = {}
        for image in range(len(self.labels_N)):
            try:
                channels, height, width = self._decoded(image).shape
                return image, (channels, height, width)
            except BadImage as error:
                problems[image] = str(error)
        raise BrokenImages(problems)


def place_of(config: Any, split: str, train: str = "path") -> tuple[str, str]:
    """The option that says where a split is, and what it says.

    Raises ValueError if there is no such split, ConfigError if the option is not given.
    """
    options = {"train": train, "heldout": "heldout"}
    if split not in options:
        raise ValueError(f"images have no split {split!r}; {did_you_mean(split, options)}")
    option = options[split]
    require(getattr(config, option) is not None, config, option, "names no held-out images; say where they are")
    require(getattr(config, option) != "", config, option, "is empty; say where the images are")
    return option, getattr(config, option)


class PackedNames:
    """A list of byte strings in two flat buffers: small, and shared by forked processes, which count no references."""

    def __init__(self) -> None:
        self._text, self._ends = bytearray(), array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> bytes:
        return bytes(self._text[self._ends[i] : self._ends[i + 1]])

    def append(self, name: bytes) -> None:
        self._text += name
        self._ends.append(len(self._text))
