"""Plain tar files of images, read in any order without unpacking.

Labels come from webdataset's layout, ``key.jpg`` beside ``key.cls`` (a whole number) or ``key.json`` (with "label");
or, if there is no such file in any of the tars, from class folders, ``…/<class>/name.jpg``: the outermost ones below
the folders that all images share, which are labels as those of `ImageFolder` are. Without any folder the images
are one class.
"""

# N images

from __future__ import annotations

import hashlib
import io
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated

import numpy as np

from dit_moe.config import ConfigError, Place, require
from dit_moe.data.base import DATASETS, place_of
from dit_moe.data.image_source import ImageSource, ImageSourceConfig
from dit_moe.data.images import FORMATS, require_bytes
from dit_moe.data.listing import (
    ONE_CLASS,
    in_sorted_order,
    merged,
    number_classes,
    require_no_splits,
    say_one_class,
)
from dit_moe.data.tar_files import UNLABELLED, find_tars, read_samples


@dataclass(frozen=True, kw_only=True)
class TarsConfig(ImageSourceConfig):
    """`path` and `heldout` are folders of .tar files, globs, or names with a range: ``train-{000..146}.tar``.

    Classes are the numbers from 0 to the largest label, or the class folders in sorted order, unless `classes` or
    `class_names` says otherwise.
    """

    path: Annotated[str, Place()]
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

    The fingerprint is of all names, sizes and labels. A run that began when the innermost folder was the class and all
    classes were numbered in sorted order, which its recorded fingerprint tells, goes on so.

    Raises:
        ValueError: no such split; a damaged tar; an image without label, a label without image, or one that is no
            class number.
        ConfigError: no tars, compressed ones, no images, or labels outside of the classes.
    """

    innermost: bool  # whether the innermost folders are the classes

    def __init__(self, config: TarsConfig, split: str) -> None:
        option, place = place_of(config, split, "images")
        self.place = place
        self.tars, beside = find_tars(option, place)
        self.parts = set(map(os.path.realpath, self.tars))
        self._stamps = [(each.st_size, each.st_mtime_ns) for each in map(os.stat, self.tars)]
        names_of, places, labels, listing, passed_over = [], array("q"), array("q"), hashlib.sha256(), [beside]
        for number, tar in enumerate(self.tars):
            samples, others = read_samples(tar)
            passed_over.append(others)
            names_of.append(np.array([os.fsencode(member.name) for member, _ in samples], dtype=bytes))
            for (name, offset, size), label in samples:
                places.extend((number, offset, size))
                labels.append(label)
                listing.update(os.fsencode(f"{name}\0{size}\0{label}\0"))
        self.passed_over = merged(passed_over)
        if not labels:
            raise ConfigError(option, f"={place} has no images; known are {', '.join(FORMATS)}")
        self._names_N = np.concatenate(names_of)
        self._places_N3, labels_N = np.array(places).reshape(-1, 3), np.array(labels)
        names: Sequence[str] = config.class_names or [str(label) for label in range(config.classes or 0)]
        trained = None
        if split != "train" and not (names and config.fingerprint is None):
            trained = Tars(replace(config, skip_broken=False), "train")
            names = trained.class_names
        self.innermost = config.fingerprint == listing.hexdigest() if trained is None else trained.innermost
        if (labels_N == UNLABELLED).all():
            labels_N, names, as_before = self._labels_of_folders(place, names)
            if not as_before:
                listing.update(labels_N.astype("<i8").tobytes())
        else:
            names = self._require_labels(labels_N, names)
        super().__init__(config, split, labels_N, names, listing.hexdigest())

    def locate(self, image: int) -> str:
        return f"{self.tars[self._places_N3[image, 0]]}: {os.fsdecode(self._names_N[image])}"

    def key(self, image: int) -> bytes:
        return bytes(self._names_N[image])

    def read(self, image: int) -> bytes:
        number, offset, size = self._places_N3[image].tolist()
        require_bytes(size, self.config.max_megapixels)
        tar = _open(self.tars[number], self._stamps[number])
        return os.pread(tar.fileno(), size, offset)

    def keep(self, image_K: np.ndarray) -> None:
        super().keep(image_K)
        self._names_N, self._places_N3 = self._names_N[image_K], self._places_N3[image_K]

    def sizes(self, images: Sequence[int]) -> np.ndarray:
        return self._places_N3[images, 2]

    def stamps(self) -> Sequence[tuple[int, int]]:
        return self._stamps

    def _require_labels(self, labels_N: np.ndarray, names: Sequence[str]) -> Sequence[str]:
        """The names of all classes: `names` unless that is empty. Raises if a label is missing or none of them."""
        if labels_N.min() == UNLABELLED:
            problem = "has no label, though other tars have files of labels; add them, or name tars of one kind"
            raise ValueError(f"{self.locate(int(labels_N.argmin()))} {problem}")
        largest = labels_N.max()
        names = names or [str(label) for label in range(min(largest + 1, len(labels_N)))]
        if largest >= len(names):
            found = f": {self.locate(int(labels_N.argmax()))} has the label {largest}"
            raise ConfigError("classes", f"{found}, but there are {len(names)} classes; correct it, or say how many")
        return names

    def _labels_of_folders(self, place: str, names: Sequence[str]) -> tuple[np.ndarray, Sequence[str], bool]:
        """Labels by class folder; the names of all classes, `names` unless that is empty; whether all is as before."""
        paths, path_N = np.unique(
            [os.path.dirname(os.fsdecode(each)) for each in self._names_N.tolist()], return_inverse=True
        )
        parts = [[part for part in path.split("/") if part not in ("", ".", "..")] for path in paths.tolist()]
        if not any(parts) and len(names) < 2:
            say_one_class(place, len(path_N))
            return np.zeros(len(path_N), dtype=np.int64), names or (ONE_CLASS,), True
        if not all(parts):
            problem = "has neither a label nor a class folder; put key.cls beside key.jpg, or use only <class>/name.jpg"
            image = int(np.argmax(path_N == next(i for i, each in enumerate(parts) if not each)))
            raise ValueError(f"{self.locate(image)} {problem}")
        levels = enumerate(zip(*parts, strict=False))
        shared = next((i for i, level in levels if len(set(level)) > 1), min(map(len, parts)))
        shared -= any(len(each) == shared for each in parts)
        folder_of = [each[-1] if self.innermost else each[shared] for each in parts]
        folders = sorted(set(folder_of))
        require_no_splits(place, folders, deep=any(len(each) > shared + 1 for each in parts))
        for folder in folders if names else ():
            if folder not in names:
                image = int(np.argmax(path_N == folder_of.index(folder)))
                found = f": {self.locate(image)} is in the folder {folder}, which is none of the {len(names)} classes"
                raise ConfigError("class_names", f"{found}; name it, or move it")
        in_order = in_sorted_order(folders)
        if names:
            classes = in_sorted_order(names)
        else:
            classes = in_order if self.innermost else number_classes(place, folders, len(path_N))
        as_before = (names or classes == in_order) and folder_of == [each[-1] for each in parts]
        return np.array([classes.label_of[folder] for folder in folder_of])[path_N], classes.names, bool(as_before)


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
