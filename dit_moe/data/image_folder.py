"""A folder of class folders of images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np

from dit_moe.config import ConfigError, NotThere, Place
from dit_moe.data.base import DATASETS, place_of
from dit_moe.data.image_source import ImageSource, ImageSourceConfig
from dit_moe.data.images import FORMATS, list_images, read_file
from dit_moe.data.listing import (
    NO_IMAGES,
    ONE_CLASS,
    OUTSIDE_CLASSES,
    ClassFolders,
    PassedOver,
    in_sorted_order,
    number_classes,
    pass_over,
    require_no_splits,
    say_one_class,
)
from dit_moe.files import missing
from dit_moe.formatting import first_few

SIZES = 1000  # files of a folder, spread evenly over all, whose sizes are in the fingerprint
FLAT = [""]  # the class folders of a folder that has images but no folders: itself


@dataclass(frozen=True, kw_only=True)
class ImageFolderConfig(ImageSourceConfig):
    """`path` and `heldout` are folders of one folder per class, or of images that are one class."""

    path: Annotated[str, Place()]
    allow_empty: bool = False  # a class folder without images, or none in `heldout`, is a warning


@DATASETS.register("image_folder", ImageFolderConfig)
class ImageFolder(ImageSource):
    """A folder of class folders, as torchvision's ImageFolder has it: ``train/<class>/….jpg``.

    The images, at any depth, come folder by folder in sorted order. Folders that are whole numbers are labels by these,
    others in sorted order (`number_classes`). A run that began when all were labels in sorted order, which its recorded
    fingerprint tells, goes on so. Without any folder the images are one class, which stderr says.

    What does not count as an image, by its name or else its first bytes, and what lies outside of the class folders is
    passed over, which stderr says. The fingerprint is of all names and the sizes of some files, so that a copy with
    smaller images is other data.

    Raises:
        ValueError: no such split.
        ConfigError: no folder, no images, a class folder without some, or the two splits have different classes.
        ValueError: a folder cannot be read.
    """

    folders: list[str]
    classes: ClassFolders

    def __init__(self, config: ImageFolderConfig, split: str) -> None:
        option, folder = place_of(config, split, "images")
        folders, files_of, self.passed_over = _class_folders(option, folder)
        trained = ImageFolder(replace(config, skip_broken=False), "train") if split != "train" else None
        if trained is not None:
            _require_same_classes(config, folders, trained.folders)
        counts = [len(files_of[name]) for name in folders]
        if empty := [name for name, count in zip(folders, counts, strict=True) if not count]:
            if not (config.allow_empty and any(counts)):
                beside = ", or set allow_empty=true beside it" if any(counts) else ""
                if not any(counts) and OUTSIDE_CLASSES in self.passed_over:
                    count = self.passed_over[OUTSIDE_CLASSES]["count"]
                    beside = f", or take the folders away: the {count:,} images beside them are one class then"
                remedy = f"add some ({', '.join(FORMATS)}){beside}"
                raise ConfigError(option, f"={folder} has no images of the class {first_few(empty)}; {remedy}")
            self.passed_over |= {NO_IMAGES: {"count": len(empty), "first": empty[0]}}
        self.place, self.folders, listing, names_of = folder, folders, hashlib.sha256(), []
        for name in folders:
            files = sorted(files_of.pop(name))
            names_of.append(np.array(files, dtype=bytes))
            listing.update(b"\0".join([os.fsencode(name), *files, b"\0"]))
        self.parts = {os.path.realpath(os.path.join(folder, name)) for name in folders}
        self.files, self._ends = np.concatenate(names_of), np.cumsum(counts)
        some = np.linspace(0, len(self.files) - 1, min(len(self.files), SIZES)).astype(int).tolist()
        listing.update(self.sizes(some).tobytes())
        in_order = ClassFolders({"": 0}, (ONE_CLASS,)) if folders == FLAT else in_sorted_order(folders)
        if trained is not None:
            self.classes = trained.classes
        elif folders == FLAT:
            say_one_class(folder, len(self.files))
            self.classes = in_order
        else:
            began_so = config.fingerprint == listing.hexdigest()
            self.classes = in_order if began_so else number_classes(folder, folders, len(self.files))
        labels = np.array([self.classes.label_of[name] for name in folders])
        if self.classes != in_order:
            listing.update(labels.astype("<i8").tobytes())
        super().__init__(config, split, np.repeat(labels, counts), self.classes.names, listing.hexdigest())

    def locate(self, image: int) -> str:
        return os.path.join(self.place, os.fsdecode(self.key(image)))

    def key(self, image: int) -> bytes:
        folder = self.folders[int(np.searchsorted(self._ends, image, side="right"))]
        return os.path.join(os.fsencode(folder), self.files[image])

    def read(self, image: int) -> bytes:
        return read_file(self.locate(image), self.config.max_megapixels)

    def keep(self, image_K: np.ndarray) -> None:
        super().keep(image_K)
        self.files, self._ends = self.files[image_K], np.searchsorted(image_K, self._ends)

    def sizes(self, images: Sequence[int]) -> np.ndarray:
        return np.array([self._stamp(image)[0] for image in images], dtype="<i8")

    def stamps(self) -> Iterator[tuple[int, int]]:
        return map(self._stamp, range(len(self.files)))

    def _stamp(self, image: int) -> tuple[int, int]:
        try:
            found = os.stat(self.locate(image))
        except OSError:  # is reported when it is read
            return -1, -1
        return found.st_size, found.st_mtime_ns


def _class_folders(option: str, folder: str) -> tuple[list[str], dict[str, list[bytes]], PassedOver]:
    """The class folders in sorted order, or `FLAT`; the images in each, by paths below it; what was passed over."""
    if not os.path.isdir(folder):
        there = os.path.exists(folder)
        problem = f"{folder} is not a folder" if there else missing(folder)
        error = ConfigError if there else NotThere
        raise error(option, f"={problem}; name a folder that has one folder of images per class")
    files, folders, passed_over = list_images(folder)
    files_of: dict[str, list[bytes]] = {os.fsdecode(each): [] for each in folders if b"/" not in each}
    if not files_of:
        if not files:
            remedy = f"put some there ({', '.join(FORMATS)}), in one folder per class or all in one, or name another"
            raise ConfigError(option, f"={folder} has no images; {remedy}")
        return FLAT, {"": files}, passed_over
    require_no_splits(folder, sorted(files_of), deep=any(b"/" in each for each in folders))
    for file in files:
        name, _, below = file.partition(b"/")
        if below:
            files_of[os.fsdecode(name)].append(below)
        else:
            pass_over(passed_over, OUTSIDE_CLASSES, os.fsdecode(file))
    return sorted(files_of), files_of, passed_over


def _require_same_classes(config: ImageFolderConfig, found: Sequence[str], wanted: Sequence[str]) -> None:
    """ConfigError unless the held-out classes are those of training, or with `allow_empty` some of them."""
    if (found == FLAT) != (wanted == FLAT):
        problem = f"has {'no ' * (found == FLAT)}class folders, unlike path={config.path}"
        raise ConfigError("heldout", f"={config.heldout} {problem}; its class folders must be the same")
    lacking = set() if config.allow_empty else set(wanted) - set(found)
    if differing := sorted((set(found) - set(wanted)) | lacking):
        problem = f"{'has' if differing[0] in found else 'lacks'} the class {differing[0]}, unlike path={config.path}"
        raise ConfigError("heldout", f"={config.heldout} {problem}; its class folders must be the same")
