"""Plain tar files of images, read in any order without unpacking.

Labels come from webdataset's layout, ``key.jpg`` beside ``key.cls`` (a whole number) or ``key.json`` (with "label");
or, if there is no such file in any of the tars, from class folders, ``…/<class>/name.jpg``.
"""

# N images

from __future__ import annotations

import glob
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dit_moe.config import ConfigError, require
from dit_moe.data.base import DATASETS
from dit_moe.data.image_source import ImageSource, ImageSourceConfig, place_of
from dit_moe.data.images import EXTENSIONS
from dit_moe.data.tar_index import UNLABELLED, TarIndex

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True, kw_only=True)
class TarsConfig(ImageSourceConfig):
    """`path` and `heldout` are folders of .tar files, globs, or names with a range: ``train-{000..146}.tar``.

    Classes are the numbers from 0 to the largest label, or the class folders in sorted order, unless `classes` or
    `class_names` says otherwise.
    """

    path: str
    classes: int | None = None  # how many there are
    class_names: tuple[str, ...] | None = None  # of the labels 0, 1, …, or of the class folders

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.classes is None or self.classes >= 1, self, "classes", "must be at least 1, or null")
        both = self.classes is not None and self.class_names is not None
        require(not both, self, "classes", "is given beside class_names; drop the line")
        names = self.class_names
        distinct = names is None or 0 < len(names) == len(set(names))
        require(distinct, self, "class_names", "must name at least one class, and none twice")


@DATASETS.register("tars", TarsConfig)
class Tars(ImageSource):
    """Images tar by tar, in the order they lie there. Only headers and labels are read here.

    Raises:
        ValueError: no such split; or a tar that is damaged, or whose images and labels are no pairs.
        ConfigError: no tars, compressed ones, no images, or labels outside of the classes.
    """

    def __init__(self, config: TarsConfig, split: str) -> None:
        option, place = place_of(config, split)
        self.index = TarIndex(find_tars(option, place))
        if not len(self.index):
            raise ConfigError(option, f"={place} has no images; known are {', '.join(EXTENSIONS)}")
        classes = config.class_names or tuple(map(str, range(config.classes or 0)))
        if not classes and split == "heldout":
            classes = Tars(config, "train").class_names
        label = _folder_labels if self.index.labels_N[0] == UNLABELLED else _number_labels
        labels_N, class_names = label(self.index, classes)
        super().__init__(config, split, labels_N, class_names, self.index.fingerprint)

    def locate(self, image: int) -> str:
        return self.index.locate(image)

    def read(self, image: int) -> bytes:
        number, offset, size = self.index.places_N3[image].tolist()
        tar = _open(self.index.tars[number], self.index.stamps[number])
        return os.pread(tar.fileno(), size, offset)

    def stamps(self) -> Sequence[tuple[int, int]]:
        return self.index.stamps


def find_tars(option: str, place: str) -> list[str]:
    """The tar files that `place` means, sorted; ConfigError if there are none, or one is missing or compressed."""
    if os.path.isdir(place):
        found = sorted(entry.path for entry in os.scandir(place) if entry.name.endswith((".tar", *COMPRESSED)))
    elif os.path.exists(place):
        found = [place]
    else:
        found = [tar for name in _expand(place) for tar in sorted(glob.glob(name)) or [name]]
    if not found:
        raise ConfigError(option, f"={place} has no .tar files; name a folder or a pattern of some")
    for tar in found:
        if tar.endswith(COMPRESSED):
            problem = f"={place}: {tar} is compressed, so that no image can be read by itself"
            raise ConfigError(option, f"{problem}; unpack it to a plain .tar (gunzip, unxz, …)")
        if not os.path.isfile(tar):
            raise ConfigError(option, f"={place}: there is no file {tar}; name a folder or a pattern of .tar files")
    return found


def _expand(pattern: str) -> list[str]:
    """``a-{08..10}.tar`` → a-08.tar, a-09.tar, a-10.tar; any number of ranges."""
    if not (found := re.search(r"\{(\d+)\.\.(\d+)\}", pattern)):
        return [pattern]
    first, last = found.groups()
    numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return [name for each in numbers for name in _expand(pattern[: found.start()] + each + pattern[found.end() :])]


def _number_labels(index: TarIndex, classes: Sequence[str]) -> tuple[np.ndarray, Sequence[str]]:
    """Labels as files give them, checked, and the names of all classes: `classes` unless that is empty."""
    largest = index.labels_N.max()
    classes = classes or [str(label) for label in range(min(largest + 1, len(index)))]
    if largest >= len(classes):
        found = f": {index.locate(int(index.labels_N.argmax()))} has the label {largest}"
        raise ConfigError("classes", f"{found}, but there are {len(classes)} classes; correct it, or say how many")
    return index.labels_N, classes


def _folder_labels(index: TarIndex, classes: Sequence[str]) -> tuple[np.ndarray, Sequence[str]]:
    """Labels by class folder, and the names of all classes: `classes` unless that is empty."""
    folders, folder_N = np.unique([index.class_folder(image) for image in range(len(index))], return_inverse=True)
    classes = list(classes or folders.tolist())
    if unknown := [folder for folder in folders.tolist() if folder not in classes]:
        found = f": {index.locate(int((folders[folder_N] == unknown[0]).argmax()))} is in the folder {unknown[0]}"
        raise ConfigError("class_names", f"{found}, which is none of the {len(classes)} classes; name it, or move it")
    return np.array([classes.index(folder) for folder in folders.tolist()])[folder_N], classes


class _Tar(io.FileIO):
    """Closes when the last user lets go of it."""

    def __del__(self) -> None:
        self.close()


@lru_cache(maxsize=64)  # in each process; forked ones may share descriptors, for pread moves no position
def _open(tar: str, stamp: tuple[int, int]) -> _Tar:
    try:
        file = _Tar(tar)
    except OSError as error:  # not the fault of one image
        raise ValueError(f"{tar} cannot be read ({error.strerror}); restore it, and start again") from None
    status = os.fstat(file.fileno())
    if (status.st_size, status.st_mtime_ns) != stamp:
        raise ValueError(f"{tar} has changed since its headers were read; start again")
    return file
