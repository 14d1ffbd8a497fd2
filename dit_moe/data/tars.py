"""Plain tar files of images, read in any order without unpacking.

Labels come from webdataset's layout, ``key.jpg`` beside ``key.cls`` (a whole number) or ``key.json`` (with "label");
or, if there is no such file in any of the tars, from class folders, ``…/<class>/name.jpg``: the outermost ones below
the folders that all images share, which are labels as those of `ImageFolder` are.
"""

# N images

from __future__ import annotations

import glob
import hashlib
import io
import math
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from dit_moe.config import ConfigError, require
from dit_moe.data.base import DATASETS, place_of
from dit_moe.data.images import EXTENSIONS, FORMATS, ImageSource, ImageSourceConfig, require_bytes, why_no_image
from dit_moe.data.listing import (
    OTHER_KINDS,
    SPECIAL,
    PassedOver,
    in_sorted_order,
    list_files,
    merged,
    never_counts,
    number_classes,
    pass_over,
    require_no_splits,
    say_passed_over,
)
from dit_moe.files import require_no_stand_in
from dit_moe.json_files import parse

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
        say_passed_over(place, self.passed_over)
        if not labels:
            raise ConfigError(option, f"={place} has no images; known are {', '.join(FORMATS)}")
        self._names_N = np.concatenate(names_of)
        self._places_N3, labels_N = np.array(places).reshape(-1, 3), np.array(labels)
        names: Sequence[str] = config.class_names or [str(label) for label in range(config.classes or 0)]
        trained = Tars(config, "train") if split == "heldout" and not (names and config.fingerprint is None) else None
        if trained is not None:
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

    def read(self, image: int) -> bytes:
        number, offset, size = self._places_N3[image].tolist()
        require_bytes(size, self.config.max_megapixels)
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

    def _labels_of_folders(self, place: str, names: Sequence[str]) -> tuple[np.ndarray, Sequence[str], bool]:
        """Labels by class folder; the names of all classes, `names` unless that is empty; whether all is as before."""
        paths, path_N = np.unique(
            [os.path.dirname(os.fsdecode(each)) for each in self._names_N.tolist()], return_inverse=True
        )
        parts = [[part for part in path.split("/") if part not in ("", ".", "..")] for path in paths.tolist()]
        if not all(parts):
            problem = "has neither a label nor a class folder; put key.cls beside key.jpg, or use <class>/name.jpg"
            image = int(np.argmax(path_N == next(i for i, each in enumerate(parts) if not each)))
            raise ValueError(f"{self.locate(image)} {problem}, such as all/name.jpg for a model without classes")
        levels = enumerate(zip(*parts, strict=False))
        shared = next((i for i, level in levels if len(set(level)) > 1), min(map(len, parts)))
        shared -= any(len(each) == shared for each in parts)
        folder_of = [each[-1] if self.innermost else each[shared] for each in parts]
        folders = sorted(set(folder_of))
        if any(len(each) > shared + 1 for each in parts):
            require_no_splits(place, folders)
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


def find_tars(option: str, place: str) -> tuple[list[str], PassedOver]:
    """The tar files that `place` means, sorted, and what lies beside them in a folder.

    ConfigError if there are none, or one is missing or compressed.
    """
    passed_over: PassedOver = {}
    if os.path.isdir(place):
        kinds = (".tar", *COMPRESSED)
        listing = list_files(
            place, lambda name, _: None if name.lower().endswith(kinds) else OTHER_KINDS, recursive=False
        )
        found = sorted(os.path.join(place, os.fsdecode(file)) for file in listing.files)
        passed_over = listing.passed_over
    elif os.path.exists(place):
        found = [place]
    else:
        found = [tar for name in _expand(option, place) for tar in sorted(glob.glob(name)) or [name]]
    if not found:
        raise ConfigError(option, f"={place} has no .tar files; name a folder or a pattern of some")
    for tar in found:
        if tar.lower().endswith(COMPRESSED):
            problem = f"={place}: {tar} is compressed, so that no image can be read by itself"
            raise ConfigError(option, f"{problem}; unpack it to a plain .tar (gunzip, unxz, …)")
        if not os.path.isfile(tar):
            wanted = "name a folder of .tar files, or a pattern such as train-{000..146}.tar"
            raise ConfigError(option, f"={place}: there is no file {tar}; {wanted}")
    return found, passed_over


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


def read_samples(tar: str) -> tuple[list[tuple[Member, int]], PassedOver]:
    """The images of one tar in order, each with its label, and what is passed over.

    The label is `UNLABELLED` throughout if there is no file of labels. webdataset's rules: a file's key is its name up
    to the first dot behind the last slash, and the rest is the field. ``cls``, or else ``json``, is the label of the
    image with the same key. Other fields are passed over, as is what does not count in folders.

    Raises ValueError as `Tars` does.
    """
    images: list[tuple[str, str, Member]] = []
    labels: dict[str, dict[str, Member]] = {}
    passed_over: PassedOver = {}
    with open(tar, "rb", buffering=0) as file:
        for member in members(tar, passed_over):
            *folders, name = [part for part in member.name.split("/") if part not in ("", ".", "..")] or [""]
            stem, _, field = name.partition(".")
            key, field = member.name.removesuffix(f".{field}"), field.lower()
            never = next((reason for part in (*folders, name) if (reason := never_counts(part))), None)
            if never is not None:
                pass_over(passed_over, f"{never} files", f"{tar}: {member.name}")
            elif stem and field in ("cls", "json"):
                labels.setdefault(key, {})[field] = member
            elif reason := why_no_image(name, partial(os.pread, file.fileno(), 32, member.offset)):
                pass_over(passed_over, reason, f"{tar}: {member.name}")
            else:
                images.append((key, field, member))
        if not labels:
            _require_once(tar, [member.name for _, _, member in images])
            return [(member, UNLABELLED) for _, _, member in images], passed_over
        known = {key for key, field, _ in images if f".{field}" in EXTENSIONS}
        pairs = []
        for key, field, member in images:
            if "." in field or (key in known and f".{field}" not in EXTENSIONS):  # key.seg.png is another field
                pass_over(passed_over, "images of other fields", f"{tar}: {member.name}")
            else:
                pairs.append((key, member))
        _require_pairs(tar, pairs, labels)
        label_of = {key: _read_label(tar, file.fileno(), fields) for key, fields in labels.items()}
    return [(member, label_of[key]) for key, member in pairs], passed_over


def members(tar: str, passed_over: PassedOver) -> Iterator[Member]:
    """The files in a tar; what they hold is jumped over. Behind the end mark another tar may follow, joined by `cat`.

    Raises ValueError if the tar is cut off, compressed or no tar, or has links, which have no content of their own.
    """
    size, last, start = os.path.getsize(tar), "its beginning", 0
    try:
        with open(tar, "rb") as file:
            while start < size or start == 0:
                file.seek(start)
                with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as headers:
                    while (header := headers.next()) is not None:
                        headers.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                        last = header.name
                        if header.issym() or header.islnk():
                            remedy = "pack the tar with --dereference --hard-dereference"
                            raise ValueError(f"{tar}: {last} is a link; {remedy}")
                        if not 0 <= header.size <= size - header.offset_data:  # an extension may have changed it
                            follow = f"{header.size:,} bytes are said to follow, and {size - header.offset_data:,} do"
                            raise tarfile.ReadError(follow)
                        if header.isfile():
                            yield Member(header.name, header.offset_data, header.size)
                        elif not header.isdir():
                            pass_over(passed_over, SPECIAL, f"{tar}: {header.name}")
                    last, start = f"{last}, or behind it", _behind_end(file, headers.offset)
    except _DAMAGE as error:
        require_no_stand_in(Path(tar))
        remedy = "fetch it again, or unpack it if it is compressed"
        raise ValueError(f"{tar} is cut off or damaged at {last} ({error}); {remedy}") from None


def _behind_end(file: BinaryIO, end: int) -> int:
    """Where something follows the end mark at `end`, or the end of the file.

    tarfile.ReadError if there is no end mark: a damaged header ends tarfile's loop, too.
    """
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("no end mark")
    while chunk := file.read(2**20):
        if rest := chunk.lstrip(tarfile.NUL):
            position = file.tell() - len(rest)
            return position - (position - end) % tarfile.BLOCKSIZE
    return file.tell()


def _require_once(tar: str, names: Sequence[str]) -> None:
    """ValueError if a name is there twice: unpacked, the second would take the place of the first."""
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"{tar} has {twice} more than once; keep one of each name")


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
        label = int(content) if "cls" in fields else parse(content)["label"]
    except (ValueError, KeyError, TypeError):
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
