"""A folder of class folders of images, as torchvision's ImageFolder has it: ``train/<class>/….jpg``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dit_moe.config import ConfigError
from dit_moe.data.base import DATASETS, is_to_follow, place_of
from dit_moe.data.images import EXTENSIONS, ImageSource, ImageSourceConfig, PackedNames

SIZES = 1000  # files, spread evenly over all, whose sizes are in the fingerprint

_SUFFIXES = tuple(os.fsencode(each) for each in EXTENSIONS)


@dataclass(frozen=True, kw_only=True)
class ImageFolderConfig(ImageSourceConfig):
    """`path` and `heldout` are folders of one folder per class."""

    path: str


@DATASETS.register("image_folder", ImageFolderConfig)
class ImageFolder(ImageSource):
    """Classes are the folders in sorted order; their images, at any depth, come class by class in sorted order.

    Hidden files, and files without the extension of an image, are passed over. No image is read here: two short
    buffers hold the names of a million files. The fingerprint is of all names and the sizes of some files, so that a
    copy with smaller images is other data.

    Raises:
        ValueError: no such split.
        ConfigError: no folder, no class folders, one without images, or the two splits have different classes.
    """

    def __init__(self, config: ImageFolderConfig, split: str) -> None:
        option, folder = place_of(config, split, "images")
        classes = _class_folders(option, folder)
        if split == "heldout":
            _require_same_classes(config, classes, _class_folders("path", config.path))
        self.folder, self.files = folder, PackedNames()
        counts, empty, listing = [], [], hashlib.sha256()
        for name in classes:
            files = sorted(_images_in(os.fsencode(os.path.join(folder, name))))
            empty += [] if files else [name]
            counts.append(len(files))
            for file in files:
                self.files.append(file)
            listing.update(b"\0".join([os.fsencode(name), *files, b"\0"]))
        if empty:
            _refuse_empty(option, folder, empty, len(classes))
        super().__init__(config, split, np.repeat(np.arange(len(classes)), counts), classes, fingerprint="")
        some = np.linspace(0, len(self.files) - 1, min(len(self.files), SIZES)).astype(int).tolist()
        listing.update(np.array([_size(self.locate(image)) for image in some], dtype="<i8").tobytes())
        self.fingerprint = listing.hexdigest()

    def locate(self, image: int) -> str:
        return os.path.join(self.folder, self.class_names[self.labels_N[image]], os.fsdecode(self.files[image]))

    def read(self, image: int) -> bytes:
        with open(self.locate(image), "rb", buffering=0) as file:
            return file.read()

    def stamps(self) -> Iterator[tuple[int, int]]:
        for image in range(len(self.files)):
            try:
                found = os.stat(self.locate(image))
            except OSError:  # is reported when it is read
                yield -1, -1
            else:
                yield found.st_size, found.st_mtime_ns


def _class_folders(option: str, folder: str) -> list[str]:
    if not os.path.isdir(folder):
        problem = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise ConfigError(option, f"={folder} {problem}; name a folder that has one folder of images per class")
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    names = sorted(entry.name for entry in shown if is_to_follow(entry.path))
    if not names:
        raise ConfigError(option, f"={folder} has no class folders; put the images into one folder per class")
    return names


def _images_in(folder: bytes) -> list[bytes]:
    """Paths, below `folder`, of the images in it."""
    found, waiting = [], [b""]
    while waiting:
        inside = waiting.pop()
        with os.scandir(os.path.join(folder, inside)) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if entry.name.lower().endswith(_SUFFIXES):
                    found.append(inside + entry.name)
                elif entry.is_dir() and is_to_follow(entry.path):
                    waiting.append(inside + entry.name + b"/")
    return found


def _size(file: str) -> int:
    """In bytes; −1 of a file that cannot be had, which is reported when it is read."""
    try:
        return os.stat(file).st_size
    except OSError:
        return -1


def _refuse_empty(option: str, folder: str, empty: Sequence[str], classes: int) -> None:
    if len(empty) == classes:
        known = ", ".join(EXTENSIONS)
        raise ConfigError(option, f"={folder} has no images in its {classes} class folders; known are {known}")
    more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
    problem = f"has no images of the class {empty[0]}{more}"
    raise ConfigError(option, f"={folder} {problem}; add some, or remove the empty folders")


def _require_same_classes(config: ImageFolderConfig, found: Sequence[str], wanted: Sequence[str]) -> None:
    """ConfigError unless the held-out classes are those of training."""
    if differing := sorted(set(found) ^ set(wanted)):
        problem = f"{'has' if differing[0] in found else 'lacks'} the class {differing[0]}, unlike path={config.path}"
        raise ConfigError("heldout", f"={config.heldout} {problem}; its class folders must be the same")
