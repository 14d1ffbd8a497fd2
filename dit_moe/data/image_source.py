"""The base class of data sets of image files: mirrored rows, splits by shares, and the report of broken files."""

# N images, B rows of a batch, U different images among them, C channels, H height, W width

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from dit_moe.config import Place, require
from dit_moe.data.base import BrokenImages
from dit_moe.data.broken_images import broken_images
from dit_moe.data.images import BadImage, decode
from dit_moe.data.listing import BROKEN, PassedOver, require_unicode_names, say_passed_over
from dit_moe.data.shares import divide
from dit_moe.formatting import printable, tell


@dataclass(frozen=True, kw_only=True)
class ImageSourceConfig:
    """The options that all sources of images have."""

    heldout: Annotated[str, Place()] | float | None = None  # where those of the split `heldout` are, or their share
    reserve: float | None = None  # share of them that is the split `extractor`, which a feature extractor learns from
    size: int | None = None  # ADM's centre crop to so many pixels square; None: as they are, all of one size
    flip: bool = False  # in training, row N + i is image i mirrored, so that an epoch shows both
    min_side: int = 8  # pixels; an image with less is refused
    max_megapixels: float = 200.0  # an image with more is refused before it is decoded
    orientation: Literal["exif"] | None = None  # turn images as their EXIF data says; None: as they are stored
    skip_broken: bool = False  # look at every image first, and leave out those that cannot be used
    fingerprint: str | None = None  # (recorded) of what the files hold

    def __post_init__(self) -> None:
        heldout, reserve = self.heldout if isinstance(self.heldout, float) else None, self.reserve
        require(heldout is None or 0 < heldout < 1, self, "heldout", "must be above 0 and below 1, a place, or null")
        require(reserve is None or 0 < reserve < 1, self, "reserve", "must be above 0 and below 1, or null")
        enough = (heldout or 0) + (reserve or 0) < 1
        require(enough, self, "reserve", f"leaves nothing to train on beside heldout={heldout}; lower it")
        require(self.size is None or self.size >= 1, self, "size", "must be at least 1, or null to keep images whole")
        require(self.min_side >= 1, self, "min_side", "must be at least 1")
        require(self.max_megapixels > 0, self, "max_megapixels", "must be above 0")


class ImageSource(ABC):
    """Base class of datasets of image files. A source says where bytes and labels come from.

    `place` is where they are, for messages; `passed_over` is what lies there and does not count, which stderr says.
    `split_counts` says how many images each split has, if shares make them.

    Args:
        config: its options. With `skip_broken` every image is decoded once, here, and those that cannot be are left
            out: the others stay in order, and the fingerprint is of them.
        split: only ``train`` is mirrored.
        labels_N: int64, of all images of the place that `place_of` finds for the split.
        class_names: of the labels 0, 1, …
        fingerprint: of what the files hold.

    Raises ValueError if `skip_broken` leaves no image, or for a class whose name is not UTF-8.
    """

    _said_orientation = False
    place = ""
    passed_over: PassedOver = {}  # noqa: RUF012  (none is changed in place)
    split_counts: Mapping[str, int] = {}

    def __init__(
        self, config: ImageSourceConfig, split: str, labels_N: np.ndarray, class_names: Sequence[str], fingerprint: str
    ) -> None:
        require_unicode_names(self.place, class_names)
        self.config, self.labels_N = config, labels_N
        self.class_names, self.fingerprint = tuple(class_names), fingerprint
        self.ways = 2 if config.flip and split == "train" else 1
        if (rows_of := divide(self, split)) is not None:
            self.split_counts = {name: len(rows) for name, rows in rows_of.items()}
            self.parts = set[str]()  # which all splits share
            self.fingerprint = hashlib.sha256(
                f"{fingerprint} {split} {config.heldout} {config.reserve}".encode()
            ).hexdigest()
            self.keep(rows_of[split])
        if config.skip_broken:
            self._leave_out(broken_images(self))
        say_passed_over(self.place, self.passed_over)

    @abstractmethod
    def read(self, image: int) -> bytes:
        """The file of an image. OSError or BadImage if that cannot be had."""

    @abstractmethod
    def locate(self, image: int) -> str:
        """Where an image is, for messages."""

    @abstractmethod
    def keep(self, image_K: np.ndarray) -> None:
        """Forget all images but these, given in rising order, which are 0, 1, … from then on."""
        self.labels_N = self.labels_N[image_K]

    def key(self, image: int) -> bytes:
        """What an image goes by among all: where they lie, and how many there are, should have no part in it."""
        return os.fsencode(self.locate(image))

    def sizes(self, images: Sequence[int]) -> np.ndarray:
        """Bytes of the files of these images, as far as they are known without reading them; −1 otherwise."""
        return np.full(len(images), -1)

    def stamps(self) -> Iterable[tuple[int, int]]:
        """(bytes, time of change in ns) of every file, as far as files can be told apart."""
        return ()

    def sha256_of_rows(self, but: Collection[int]) -> str:
        """Of the names and labels of all images, and of the sizes of their files except for the images `but`."""
        count = len(self.labels_N)
        sizes_N = np.array(self.sizes(range(count)), dtype="<i8")
        sizes_N[list(but)] = -1
        digest = hashlib.sha256(b"\0".join(map(self.key, range(count))))
        digest.update(repr(self.class_names).encode() + self.labels_N.astype("<i8").tobytes() + sizes_N.tobytes())
        return digest.hexdigest()

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
                pixels_CHW = self._decoded(image)
            except BadImage as error:
                problems |= dict.fromkeys(rows_B[where_B == i].tolist(), str(error))
                continue
            if pixels_CHW.shape != self.image_shape:
                first, (_, height, width) = self._first
                found = f"{self.locate(image)} is {pixels_CHW.shape[2]}×{pixels_CHW.shape[1]}"
                problem = f"{found}, and {self.locate(first)} {width}×{height}"  # no key: it may be read in any section
                raise ValueError(f"{problem}; set size in their section to make them one")
            images_UCHW[i] = pixels_CHW
        if problems:
            raise BrokenImages(problems)
        images_BCHW, mirrored_B = torch.from_numpy(images_UCHW[where_B]), torch.from_numpy(way_B == 1)
        images_BCHW[mirrored_B] = images_BCHW[mirrored_B].flip(-1)
        return {"images": images_BCHW, "labels": torch.from_numpy(self.labels_N[image_B])}

    def class_counts(self) -> list[int]:
        return np.bincount(self.labels_N, minlength=len(self.class_names)).tolist()

    def _leave_out(self, broken: dict[int, str]) -> None:
        """Keep the images that are not `broken`, image → what is wrong with it."""
        if not broken:
            return
        if len(broken) == len(self.labels_N):
            raise ValueError(f"none of the {len(broken)} images can be used: {broken[0]}; mend them, or name others")
        self.passed_over = self.passed_over | {BROKEN: {"count": len(broken), "first": printable(broken[min(broken)])}}
        self.fingerprint = hashlib.sha256(f"{self.fingerprint} without {sorted(broken)}".encode()).hexdigest()
        self.keep(np.delete(np.arange(len(self.labels_N)), list(broken)))

    def problem(self, image: int) -> str | None:
        """Why an image cannot be used, naming it; None if it can."""
        try:
            self._decoded(image)
        except BadImage as error:
            return str(error)
        return None

    def _decoded(self, image: int) -> np.ndarray:
        """uint8 [C, H, W]. BadImage names the file."""
        limits = self.config
        try:
            turn = partial(self._turn, image)
            return decode(self.read(image), limits.size, limits.min_side, limits.max_megapixels, turn)
        except OSError as error:
            problem = f"cannot be read ({error.strerror or error})"
        except BadImage as error:
            problem = str(error)
        raise BadImage(f"{self.locate(image)} {problem}")

    def _turn(self, image: int, orientation: int) -> bool:
        if self.config.orientation is None and not self._said_orientation:
            self._said_orientation = True  # in each process that reads, for none knows what others met
            problem = f"{self.locate(image)} has the EXIF orientation {orientation}, which is not applied"
            tell(f"note: {problem}, nor are others'; datasets take the option orientation: exif")
        return self.config.orientation == "exif"

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
