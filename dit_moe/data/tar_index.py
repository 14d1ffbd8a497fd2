"""What plain tar files of images hold, and where: read from their headers, and the few bytes of each label."""

# N images

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dit_moe.data.image_source import PackedNames
from dit_moe.data.images import EXTENSIONS

UNLABELLED = -1


class Member(NamedTuple):
    """A file in a tar: its name there, where its content begins, and its size in bytes."""

    name: str
    offset: int
    size: int


class TarIndex:
    """The images of some tars, in order.

    Attributes:
        stamps: size and time of change of each tar.
        places_N3: number of the tar, offset and size of each image.
        labels_N: `UNLABELLED` throughout if there is not one file of labels.
        fingerprint: of all names, sizes and labels.

    Raises:
        ValueError: a damaged tar, an image without label, a label without image, or one that is no class number.
    """

    def __init__(self, tars: Sequence[str]) -> None:
        self.tars, self._names = tuple(tars), PackedNames()
        status = [os.stat(tar) for tar in tars]
        self.stamps = [(each.st_size, each.st_mtime_ns) for each in status]
        places, labels, listing = array("q"), array("q"), hashlib.sha256()
        for number, tar in enumerate(tars):
            for (name, offset, size), label in read_samples(tar):
                self._names.append(os.fsencode(name))
                places.extend((number, offset, size))
                labels.append(label)
                listing.update(os.fsencode(f"{name}\0{size}\0{label}\0"))
        self.places_N3, self.labels_N = np.array(places).reshape(-1, 3), np.array(labels)
        self.fingerprint = listing.hexdigest()
        missing = np.flatnonzero(self.labels_N == UNLABELLED)
        if 0 < len(missing) < len(labels):
            problem = "has no label, though other tars have files of labels"
            raise ValueError(f"{self.locate(int(missing[0]))} {problem}; add them, or name tars of one kind")

    def __len__(self) -> int:
        return len(self.labels_N)

    def locate(self, image: int) -> str:
        """Tar and name of an image, for messages."""
        return f"{self.tars[self.places_N3[image, 0]]}: {os.fsdecode(self._names[image])}"

    def class_folder(self, image: int) -> str:
        """The folder that an image lies in; ValueError if in none."""
        folder = os.path.basename(os.path.dirname(os.fsdecode(self._names[image])))
        if folder in ("", "."):
            problem = "has neither a label nor a class folder"
            raise ValueError(f"{self.locate(image)} {problem}; put key.cls beside key.jpg, or use <class>/name.jpg")
        return folder


def read_samples(tar: str) -> list[tuple[Member, int]]:
    """The images of one tar in order, each with its label.

    webdataset's rules: a file's key is its name up to the first dot behind the last slash, and the rest is the field.
    ``cls``, or else ``json``, is the label of the image with the same key. Other fields are passed over, and so are
    hidden files.

    Raises ValueError as `TarIndex` does.
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
    images = [each for each in images if "." not in each[1]]  # key.seg.png is another field
    _require_pairs(tar, images, labels)
    with open(tar, "rb", buffering=0) as file:
        label_of = {key: _read_label(tar, file.fileno(), fields) for key, fields in labels.items()}
    return [(member, label_of[key]) for key, _, member in images]


def members(tar: str) -> Iterator[Member]:
    """The files in a tar; what they hold is jumped over.

    Raises ValueError if the tar is cut off, compressed or no tar, or has links, which have no content of their own.
    """
    size, last = os.path.getsize(tar), "its beginning"
    try:
        with tarfile.open(tar, "r:") as headers:
            while (header := headers.next()) is not None:
                headers.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                last = header.name
                if header.issym() or header.islnk():
                    raise ValueError(f"{tar}: {last} is a link; pack the tar with --dereference --hard-dereference")
                if header.offset_data + header.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                if header.isfile():
                    yield Member(header.name, header.offset_data, header.size)
            with open(tar, "rb", buffering=0) as file:  # a damaged header ends the loop too, but not with this mark
                if os.pread(file.fileno(), tarfile.BLOCKSIZE, headers.offset) != tarfile.NUL * tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("no end mark")
    except tarfile.TarError as error:
        remedy = "fetch it again, or unpack it if it is compressed"
        raise ValueError(f"{tar} is cut off or damaged at {last} ({error}); {remedy}") from None


def _require_pairs(tar: str, images: list[tuple[str, str, Member]], labels: dict[str, dict[str, Member]]) -> None:
    """ValueError unless each key has one image and a label."""
    seen: set[str] = set()
    for key, _, member in images:
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
    content = os.pread(descriptor, member.size, member.offset)
    try:
        label = int(content) if "cls" in fields else json.loads(content)["label"]
    except (ValueError, KeyError, TypeError):
        label = None
    if type(label) is not int or not 0 <= label < 2**31:
        wanted = 'a whole number from 0 up, in json under "label"'
        raise ValueError(f"{tar}: {member.name} holds {content[:50].decode(errors='replace')!r}; it must be {wanted}")
    return label
