"""Labelled image sets by name, such as CIFAR-10: as torchvision downloads them, or as a folder of class folders."""

# N images

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from dit_moe.config import ConfigError, Place, require
from dit_moe.data.base import DATASETS, place_of
from dit_moe.data.image_folder import SIZES, ImageFolder, ImageFolderConfig
from dit_moe.data.image_source import ImageSource, ImageSourceConfig
from dit_moe.data.images import read_file
from dit_moe.data.listing import never_counts
from dit_moe.data.torchvision_downloads import SETS, open_split
from dit_moe.registry import did_you_mean

NAMES = tuple({name for each in SETS.values() for name in each.splits})  # of splits, which are no folders


@dataclass(frozen=True, kw_only=True)
class TorchvisionConfig(ImageSourceConfig):
    """`train` and `heldout` name splits of the set."""

    set: str
    path: Annotated[str, Place()] | None = None  # folder that has it, or gets it, or has class folders; None: data/SET
    train: str = "train"
    heldout: Annotated[str, Place(NAMES)] | float | None = "test"  # of class folders: a folder of others, or a share

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.set in SETS, self, "set", f"is not known; {did_you_mean(self.set, SETS)}")
        require(self.heldout != self.train, self, "heldout", "is trained on; name another split, a share, or null")
        if self.path is None:
            object.__setattr__(self, "path", f"data/{self.set}")

    @property
    def num_classes(self) -> int:
        """What its classes are, before it is downloaded."""
        return SETS[self.set].classes

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) that its images will have; None: they have different sizes."""
        side = self.size or SETS[self.set].side
        return None if side is None else (3, side, side)

    @property
    def extractor(self) -> str | None:
        """The feature extractor that was made for the set."""
        return "cifar10_cnn64" if self.set == "cifar10" else None


@DATASETS.register("torchvision", TorchvisionConfig)
def open_set(config: TorchvisionConfig, split: str) -> ImageSource:
    """A split of a set: of class folders, if `path` has any, and otherwise as torchvision downloads it.

    Arrays, as CIFAR's, have the keys that they would have as class folders, so shares divide both alike.

    Raises:
        NoSuchSplit: no such split.
        ConfigError: it cannot be downloaded, files are damaged, or the folders are of another number of classes.
    """
    path, known = str(config.path), SETS[config.set]
    if not _has_class_folders(path, but=known.folder):
        return TorchvisionSet(config, split)
    if split == "heldout" and config.heldout in NAMES:
        problem = f"={config.heldout} is no folder and no share, and path={path} holds class folders"
        raise ConfigError("heldout", f"{problem}; give the share to hold out, such as heldout=0.1")
    shared = {field.name: getattr(config, field.name) for field in fields(ImageSourceConfig)}
    found = ImageFolder(ImageFolderConfig(path=path, **shared), split)
    if len(found.class_names) != known.classes:
        problem = f"={path} holds {len(found.class_names)} class folders, and {config.set} has {known.classes} classes"
        raise ConfigError("path", f"{problem}; name its folder, or set data.name=image_folder for other images")
    return found


class TorchvisionSet(ImageSource):
    """A split that torchvision reads: arrays that are kept in memory, or image files."""

    def __init__(self, config: TorchvisionConfig, split: str) -> None:
        option, name = place_of(config, split, "images", train="train")
        if name not in SETS[config.set].splits:
            problem = f"={name} is no split of {config.set}; {did_you_mean(name, SETS[config.set].splits)}"
            raise ConfigError(option, problem)
        root = str(config.path)
        self._set, self.place = open_split(config.set, root, name), f"{root}, {name}"
        classes = [each if isinstance(each, str) else ", ".join(each) for each in self._set.classes]
        rows = [self._set[row] for row in range(len(self._set))]
        labels_N = np.array([label for _, label in rows], dtype=np.int64)
        self._row_N, listing = np.arange(len(rows)), hashlib.sha256(f"{config.set} {name}".encode())
        self.keys = _numbered(labels_N, classes)
        if isinstance(rows[0][0], str):
            self.keys = [os.fsencode(Path(file).relative_to(root)) for file, _ in rows]
        listing.update(labels_N.tobytes() + b"\0".join(self.keys))
        some = np.linspace(0, len(rows) - 1, min(len(rows), SIZES)).astype(int).tolist()
        listing.update(self.sizes(some).tobytes())
        super().__init__(config, split, labels_N, classes, listing.hexdigest())

    def keep(self, image_K: np.ndarray) -> None:
        super().keep(image_K)
        self._row_N = self._row_N[image_K]

    def locate(self, image: int) -> str:
        item = self._item(image)
        return item if isinstance(item, str) else f"{self.place}, image {self._row_N[image]}"

    def key(self, image: int) -> bytes:
        return self.keys[self._row_N[image]]

    def read(self, image: int) -> bytes:
        """The image file; of an array, one in the format PPM, so that it is treated as all images are."""
        item = self._item(image)
        if isinstance(item, str):
            return read_file(item, self.config.max_megapixels)
        return b"P6 %d %d 255\n" % item.size + item.convert("RGB").tobytes()

    def sizes(self, images: Sequence[int]) -> np.ndarray:
        items = map(self._item, images)
        return np.array([os.path.getsize(item) if isinstance(item, str) else -1 for item in items], dtype="<i8")

    def _item(self, image: int) -> Any:
        return self._set[int(self._row_N[image])][0]


def _has_class_folders(path: str, but: str) -> bool:
    """Whether a folder holds folders, and not the one that torchvision makes."""
    if not os.path.isdir(path):
        return False
    with os.scandir(path) as entries:
        folders = {entry.name for entry in entries if entry.is_dir() and never_counts(entry.name) is None}
    return bool(folders) and but not in folders


def _numbered(labels_N: np.ndarray, classes: Sequence[str]) -> list[bytes]:
    """What images would be called in class folders, numbered within each: ``airplane/0007.jpg``."""
    number_N = np.empty_like(labels_N)
    for label in range(len(classes)):
        rows = np.flatnonzero(labels_N == label)
        number_N[rows] = np.arange(len(rows))
    return [f"{classes[label]}/{number:04d}.jpg".encode() for label, number in zip(labels_N, number_N, strict=True)]
