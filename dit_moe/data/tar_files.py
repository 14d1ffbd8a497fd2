"""Plain tar files: which ones are meant, and what is in each. No header is believed.

The images of a tar have a label each where files of labels lie beside them, in webdataset's layout.
"""

from __future__ import annotations

import glob
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dit_moe.config import ConfigError
from dit_moe.data.images import EXTENSIONS, why_no_image
from dit_moe.data.listing import OTHER_KINDS, SPECIAL, PassedOver, list_files, never_counts, pass_over
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
