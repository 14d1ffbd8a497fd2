"""Plain tar files of images, read in any order without unpacking.

Labels come from webdataset's layout, ``key.jpg`` beside ``key.cls`` (a whole number) or ``key.json`` (with "label");
or, if there is no such file in any of the tars, from class folders, ``…/<class>/name.jpg``.
"""

# N images

from __future__ import annotations

import glob
import hashlib
import io
import json
import math
import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit_moe.config import ConfigError, require
from dit_moe.data.base import DATASETS, place_of
from dit_moe.data.images import EXTENSIONS, FORMATS, ImageSource, ImageSourceConfig
from dit_moe.files import require_no_stand_in

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
UNLABELLED = -1
MOST_TARS = 100_000  # that a pattern names
MOST_LABEL = 2**20  # bytes of a file of labels
MOST_EXTENSION = 2**20  # bytes of a header that extends the next one
MOST_DIGITS = 2**10  # in a row there: tarfile searches them in quadratic time (CVE-2024-6232)
EXTENSIONS_OF_HEADERS = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)


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

    The fingerprint is of all names, sizes and labels.

    Raises:
        ValueError: no such split; a damaged tar; an image without label, a label without image, or one that is no
            class number.
        ConfigError: no tars, compressed ones, no images, or labels outside of the classes.
    """

    def __init__(self, config: TarsConfig, split: str) -> None:
        option, place = place_of(config, split, "images")
        self.tars = find_tars(option, place)
        self.parts = set(map(os.path.realpath, self.tars))
        self._stamps = [(each.st_size, each.st_mtime_ns) for each in map(os.stat, self.tars)]
        names_of, places, labels, listing = [], array("q"), array("q"), hashlib.sha256()
        for number, tar in enumerate(self.tars):
            samples = read_samples(tar)
            names_of.append(np.array([os.fsencode(member.name) for member, _ in samples], dtype=bytes))
            for (name, offset, size), label in samples:
                places.extend((number, offset, size))
                labels.append(label)
                listing.update(os.fsencode(f"{name}\0{size}\0{label}\0"))
        if not labels:
            raise ConfigError(option, f"={place} has no images; known are {', '.join(FORMATS)}")
        self._names_N = np.concatenate(names_of)
        self._places_N3, labels_N = np.array(places).reshape(-1, 3), np.array(labels)
        names: Sequence[str] = config.class_names or [str(label) for label in range(config.classes or 0)]
        if not names and split == "heldout":
            names = Tars(config, "train").class_names
        if (labels_N == UNLABELLED).all():
            labels_N, names = self._labels_of_folders(names)
        else:
            names = self._require_labels(labels_N, names)
        super().__init__(config, split, labels_N, names, listing.hexdigest())

    def locate(self, image: int) -> str:
        return f"{self.tars[self._places_N3[image, 0]]}: {os.fsdecode(self._names_N[image])}"

    def read(self, image: int) -> bytes:
        number, offset, size = self._places_N3[image].tolist()
        tar = _open(self.tars[number], self._stamps[number])
        return os.pread(tar.fileno(), size, offset)

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

    def _labels_of_folders(self, names: Sequence[str]) -> tuple[np.ndarray, Sequence[str]]:
        """Labels by class folder, and the names of all classes: `names` unless that is empty."""
        folder_of = [os.path.basename(os.path.dirname(os.fsdecode(name))) for name in self._names_N.tolist()]
        folders, folder_N = np.unique(folder_of, return_inverse=True)
        for folder, image in zip(folders.tolist(), np.unique(folder_N, return_index=True)[1].tolist(), strict=True):
            if folder in ("", "."):
                problem = "has neither a label nor a class folder; put key.cls beside key.jpg, or use <class>/name.jpg"
                raise ValueError(f"{self.locate(image)} {problem}")
            if names and folder not in names:
                found = f": {self.locate(image)} is in the folder {folder}, which is none of the {len(names)} classes"
                raise ConfigError("class_names", f"{found}; name it, or move it")
        names = list(names or folders.tolist())
        return np.array([names.index(folder) for folder in folders.tolist()])[folder_N], names


def find_tars(option: str, place: str) -> list[str]:
    """The tar files that `place` means, sorted; ConfigError if there are none, or one is missing or compressed."""
    if os.path.isdir(place):
        found = sorted(entry.path for entry in os.scandir(place) if entry.name.endswith((".tar", *COMPRESSED)))
    elif os.path.exists(place):
        found = [place]
    else:
        found = [tar for name in _expand(option, place) for tar in sorted(glob.glob(name)) or [name]]
    if not found:
        raise ConfigError(option, f"={place} has no .tar files; name a folder or a pattern of some")
    for tar in found:
        if tar.endswith(COMPRESSED):
            problem = f"={place}: {tar} is compressed, so that no image can be read by itself"
            raise ConfigError(option, f"{problem}; unpack it to a plain .tar (gunzip, unxz, …)")
        if not os.path.isfile(tar):
            wanted = "name a folder of .tar files, or a pattern such as train-{000..146}.tar"
            raise ConfigError(option, f"={place}: there is no file {tar}; {wanted}")
    return found


def _expand(option: str, pattern: str) -> list[str]:
    """``a-{08..10}.tar`` → a-08.tar, a-09.tar, a-10.tar; any number of ranges.

    ConfigError for a range that counts down, and for more than `MOST_TARS` names.
    """
    ranges = re.findall(r"\{(\d{1,18})\.\.(\d{1,18})\}", pattern)
    if falling := [f"{{{first}..{last}}}" for first, last in ranges if int(first) > int(last)]:
        raise ConfigError(option, f"={pattern}: {falling[0]} counts down; write the smaller number first")
    if (count := math.prod(int(last) - int(first) + 1 for first, last in ranges)) > MOST_TARS:
        raise ConfigError(option, f"={pattern} names {count:,} files, more than {MOST_TARS:,}; correct the range")
    names = [""]
    parts = re.split(r"\{\d{1,18}\.\.\d{1,18}\}", pattern)
    for part, (first, last) in zip(parts[:-1], ranges, strict=True):
        numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
        names = [name + part + number for name in names for number in numbers]
    return [name + parts[-1] for name in names]


# ------------------------------------------------------------------------------------------------- what is in one tar


class _Header(tarfile.TarInfo):
    """A header that is refused where tarfile would go round in circles, or read without end, by what it claims."""

    def _proc_member(self, tar: Any) -> Any:  # is called for each header, and is there to be overridden
        if self.size < 0:
            raise tarfile.ReadError("a negative size")  # the next header would be this one (CVE-2025-8194)
        extension = b""
        if self.type in EXTENSIONS_OF_HEADERS:
            if self.size > MOST_EXTENSION:
                raise tarfile.ReadError(f"a header of {self.size:,} bytes")
            start = tar.fileobj.tell()
            extension = tar.fileobj.read(self.size)
            tar.fileobj.seek(start)
        if any(len(digits) > MOST_DIGITS for digits in re.findall(rb"\d+", extension)):
            raise tarfile.ReadError("a number without end")
        if self.type == tarfile.GNUTYPE_SPARSE or b"GNU.sparse." in extension:
            raise tarfile.ReadError("a file with holes; pack the tar without --sparse")
        return super()._proc_member(tar)  # type: ignore[misc]


_DAMAGE = (tarfile.TarError, UnicodeError, LookupError, RecursionError, OverflowError)  # as tarfile's parsers show it


class Member(NamedTuple):
    """A file in a tar: its name there, where its content begins, and its size in bytes."""

    name: str
    offset: int
    size: int


def read_samples(tar: str) -> list[tuple[Member, int]]:
    """The images of one tar in order, each with its label; `UNLABELLED` throughout if there is no file of labels.

    webdataset's rules: a file's key is its name up to the first dot behind the last slash, and the rest is the field.
    ``cls``, or else ``json``, is the label of the image with the same key. Other fields are passed over, and so are
    hidden files.

    Raises ValueError as `Tars` does.
    """
    images: list[tuple[str, str, Member]] = []
    labels: dict[str, dict[str, Member]] = {}
    for member in members(tar):
        stem, _, field = os.path.basename(member.name).partition(".")
        key, field = member.name.removesuffix(f".{field}"), field.lower()
        if stem and field in ("cls", "json"):
            labels.setdefault(key, {})[field] = member
        elif stem and field and f".{field.rpartition('.')[2]}" in EXTENSIONS:
            images.append((key, field, member))
    if not labels:
        return [(member, UNLABELLED) for _, _, member in images]
    pairs = [(key, member) for key, field, member in images if "." not in field]  # key.seg.png is another field
    _require_pairs(tar, pairs, labels)
    with open(tar, "rb", buffering=0) as file:
        label_of = {key: _read_label(tar, file.fileno(), fields) for key, fields in labels.items()}
    return [(member, label_of[key]) for key, member in pairs]


def members(tar: str) -> Iterator[Member]:
    """The files in a tar; what they hold is jumped over.

    Raises ValueError if the tar is cut off, compressed or no tar, or has links, which have no content of their own.
    """
    size, last = os.path.getsize(tar), "its beginning"
    try:
        with tarfile.open(tar, "r:", tarinfo=_Header) as headers:
            while (header := headers.next()) is not None:
                headers.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                last = header.name
                if header.issym() or header.islnk():
                    raise ValueError(f"{tar}: {last} is a link; pack the tar with --dereference --hard-dereference")
                if not 0 <= header.size <= size - header.offset_data:  # an extension may have changed it
                    follow = size - header.offset_data
                    raise tarfile.ReadError(f"{header.size:,} bytes are said to follow, and {follow:,} do")
                if header.isfile():
                    yield Member(header.name, header.offset_data, header.size)
            with open(tar, "rb", buffering=0) as file:  # a damaged header ends the loop too, but not with this mark
                if os.pread(file.fileno(), tarfile.BLOCKSIZE, headers.offset) != tarfile.NUL * tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("no end mark")
    except _DAMAGE as error:
        require_no_stand_in(Path(tar))
        remedy = "fetch it again, or unpack it if it is compressed"
        raise ValueError(f"{tar} is cut off or damaged at {last} ({error}); {remedy}") from None


def _require_pairs(tar: str, images: list[tuple[str, Member]], labels: dict[str, dict[str, Member]]) -> None:
    """ValueError unless each key has one image and a label."""
    seen: set[str] = set()
    for key, member in images:
        if key not in labels:
            raise ValueError(f"{tar}: {member.name} has no label; add {key}.cls, or remove the image")
        if key in seen:
            raise ValueError(f"{tar}: {member.name} is the second image of {key}; keep one")
        seen.add(key)
    for key, fields in labels.items():
        if key not in seen:
            name = next(iter(fields.values())).name
            raise ValueError(f"{tar}: {name} is the label of no image; add {key}.jpg, or remove the label")


def _read_label(tar: str, descriptor: int, fields: dict[str, Member]) -> int:
    member = fields.get("cls") or fields["json"]
    content = os.pread(descriptor, min(member.size, MOST_LABEL), member.offset)
    try:
        label = int(content) if "cls" in fields else json.loads(content)["label"]
    except (ValueError, KeyError, TypeError, RecursionError):
        label = None
    if type(label) is not int or not 0 <= label < 2**31:
        wanted = 'a whole number from 0 up, in json under "label"'
        raise ValueError(f"{tar}: {member.name} holds {content[:50].decode(errors='replace')!r}; it must be {wanted}")
    return label


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
