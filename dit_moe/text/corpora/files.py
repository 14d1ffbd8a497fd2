"""Corpora in files: text files, each of them a document, or JSON lines, each line a document.

Files that were packed by gzip, zstd, xz or bzip2 are unpacked while they are read, whatever their names.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, cast

from dit_moe.config import ConfigError
from dit_moe.data.listing import OTHER_KINDS, PassedOver, list_files, merged, never_counts, say_passed_over
from dit_moe.json_files import parse
from dit_moe.registry import did_you_mean
from dit_moe.text.corpora import CORPORA, MARK, Corpus, SourceConfig, source_of

LONGEST_LINE, LARGEST_TEXT = 2**28, 2**30  # bytes of a document, in a file of many and in a file of its own
PACKED = (".gz", ".zst", ".xz", ".bz2")
OTHER_FORMATS = {  # by their first bytes, and what to do with them
    b"\xff\xfe": "is UTF-16; convert it, for instance with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "is UTF-16; convert it, for instance with iconv -f UTF-16 -t UTF-8",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"PAR1": "is of Parquet; name its folder in tokenize.corpus={name: huggingface, id: …}",
    b"%PDF": "is a PDF; extract its text",
}
REMEDY = "; convert it, for instance with jq -c '.[]' FILE > FILE.jsonl"
_NOT_NAMED = "files that the pattern does not name"  # which a user knows


@dataclass(frozen=True, kw_only=True)
class FilesConfig(SourceConfig):
    """`path` and `heldout`: a file, a pattern such as books/**/*.txt, or a folder of .txt and .md files."""

    path: str
    heldout: str | None = None


@dataclass(frozen=True, kw_only=True)
class JsonLinesConfig(FilesConfig):
    """`path` and `heldout`: a file, a pattern such as books/**/*.jsonl, or a folder of .jsonl files, packed or not."""

    field: str = "text"  # of a line's object


class _FileCorpus(Corpus):
    """Documents in the order of the files' paths."""

    unchecked_options = ("path", "heldout")
    suffixes: tuple[str, ...]

    def __init__(self, config: FilesConfig, split: str) -> None:
        super().__init__(split, config)
        self.files, self.passed_over = find_files(config, split, self.suffixes)
        self.fingerprint = fingerprint_of(self.files)
        if not any(file.suffix in PACKED for file in self.files):
            self.size = sum(file.stat().st_size for file in self.files)


@CORPORA.register("files", FilesConfig)
class Files(_FileCorpus):
    """Each file is a document."""

    suffixes = (".txt", ".md")

    def read(self, start: int) -> Iterator[tuple[str, str]]:
        for file in self.files[start:]:
            yield str(file), read_text(file)


@CORPORA.register("jsonl", JsonLinesConfig)
class JsonLines(_FileCorpus):
    """Each line is a document; blank lines are left out."""

    suffixes = (".jsonl",)

    def __init__(self, config: JsonLinesConfig, split: str) -> None:
        super().__init__(config, split)
        self.field = config.field

    def read(self, start: int) -> Iterator[tuple[str, str | None]]:
        for file in self.files:
            position = 0
            for number, line in enumerate(_lines(file), 1):
                if line.strip():
                    if start > 0:  # skipped without reading it
                        start -= 1
                    else:
                        where = f"{file}, line {number},"
                        yield where, self._text(decode_utf8(line, where, position).removeprefix(MARK), where)
                position += len(line)

    def _text(self, line: str, where: str) -> str | None:
        try:
            row = parse(line, any_number=True, any_text=True)  # of which `rows` reads the one text that counts
        except ValueError as error:
            if "\r" in line.strip():
                raise ValueError(f"{where} has line ends of CR alone; convert them, with tr '\\r' '\\n'") from None
            if line.strip() in ("[", "{"):
                raise ValueError(
                    f"{where} is not JSON by itself: the file is one JSON document, wanted one object per line{REMEDY}"
                ) from None
            raise ValueError(f"{where} {error}; mend or remove it") from None
        if not isinstance(row, dict):
            remedy = REMEDY if isinstance(row, list) else "; mend or remove it"
            raise ValueError(f"{where} is not a JSON object but {type(row).__name__}{remedy}")
        text = row.get(self.field)
        if text is None:
            has = "null in the" if self.field in row else "no"
            hint = "" if self.field in row else f"; {did_you_mean(self.field, row)}"
            self.without_text(f"{where} has {has} field {self.field!r}{hint}")
        elif not isinstance(text, str):
            kind = type(text).__name__
            raise ValueError(f"{where} has no text in the field {self.field!r} but {kind}; mend or remove it")
        return text


def find_files(config: FilesConfig, split: str, suffixes: Sequence[str]) -> tuple[list[Path], PassedOver]:
    """The files of a split, in order: one, or those that match a pattern, or those in a folder with such suffixes.

    And what lies beside them and is passed over, which stderr says.

    Raises ConfigError if there are none, or if one belongs to both splits.
    """
    option, place = source_of(config, split, train="path")
    files, passed_over = _matching(place, suffixes)
    if not files:
        problem = f"={place} names no files of text"
        raise ConfigError(option, f"{problem}; name a file, a pattern, or a folder of {' or '.join(suffixes)} files")
    if config.heldout is not None:
        held_out = {each.resolve() for each in _matching(config.heldout, suffixes)[0]}
        for each in _matching(config.path, suffixes)[0]:
            if each.resolve() in held_out:
                problem = f"={config.heldout} names {each}, which path={config.path} names too"
                raise ConfigError("heldout", f"{problem}; name text that is not trained on, or set heldout_every")
    say_passed_over(place, passed_over)
    return files, passed_over


def _matching(place: str, suffixes: Sequence[str]) -> tuple[list[Path], PassedOver]:
    """A pattern with ** is matched with what `list_files` finds, for glob would follow links round and round."""
    if os.path.isfile(place):
        return [Path(place)], {}
    if os.path.isdir(place):
        endings = tuple(suffix + packed for suffix in suffixes for packed in ("", *PACKED))
        return _in_folder(place, lambda name, _: None if name.lower().endswith(endings) else OTHER_KINDS)
    head, *rest = re.split(r"(?:^|(?<=/))\*\*(?:/|$)", place, maxsplit=1)
    if not rest:
        named = [each for each in glob.glob(place) if os.path.isfile(each) and not never_counts(os.path.basename(each))]
        return sorted(map(Path, named)), {}
    pattern = ("**", *Path(rest[0]).parts)

    def found_below(folder: str) -> tuple[list[Path], PassedOver]:
        return _in_folder(
            folder, lambda _, path: None if _is_named(Path(path).relative_to(folder).parts, pattern) else _NOT_NAMED
        )

    found = [found_below(each) for each in glob.glob(head or ".") if os.path.isdir(each)]
    return sorted(file for files, _ in found for file in files), merged(passed_over for _, passed_over in found)


def _is_named(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a pattern names a path, both in their parts; ** stands for any number of these."""
    if not path or not pattern:
        return not path and set(pattern) <= {"**"}
    if pattern[0] == "**":
        return _is_named(path, pattern[1:]) or _is_named(path[1:], pattern)
    return fnmatchcase(path[0], pattern[0]) and _is_named(path[1:], pattern[1:])


def _in_folder(folder: str, why_not: Callable[[str, str], str | None]) -> tuple[list[Path], PassedOver]:
    found = list_files(folder, why_not)
    found.passed_over.pop(_NOT_NAMED, None)
    return sorted(Path(folder, os.fsdecode(file)) for file in found.files), found.passed_over


def fingerprint_of(files: Sequence[Path]) -> str:
    """A hash of the files' sizes, and of their names below the folder that they share."""
    shared = os.path.commonpath([each.parent for each in files])
    listing = [(each.relative_to(shared).as_posix(), each.stat().st_size) for each in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------ bytes to text


def read_text(file: Path) -> str:
    """The text of a whole file, with its byte-order mark. ValueError if it is too large, damaged, or not UTF-8."""
    packed = _unpacker(file) is not None
    most = LONGEST_LINE if packed else LARGEST_TEXT  # what is packed tells its size when it is read, as a line does
    with _opened(file) as stream:
        long = not packed and file.stat().st_size > most
        raw = b"" if long else stream.read(most + 1 if packed else -1)
    if long or len(raw) > most:
        problem = f"{file} has more than {most / 1e6:.0f} MB, and is read as one document"
        raise ValueError(f"{problem}; cut it into several files, or make it JSON lines")
    return decode_utf8(raw, str(file))


def decode_utf8(raw: bytes, where: str, offset: int = 0) -> str:
    """The text of UTF-8 bytes, unchanged; ValueError, naming the byte (the first is number `offset`), if it is not."""
    for start, problem in OTHER_FORMATS.items():
        if offset == 0 and raw.startswith(start):
            raise ValueError(f"{where} {problem}")
    if (null := raw.find(0)) >= 0:
        problem = f"{where} has a zero byte at position {offset + null}, which is in no text"
        raise ValueError(f"{problem}; convert it if it is UTF-16 (for instance with iconv), or leave it out")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        problem = f"{where} is not UTF-8: byte 0x{raw[error.start]:02x} at position {offset + error.start}"
        raise ValueError(f"{problem}; convert it (for instance with iconv), or leave it out") from None


def _lines(file: Path) -> Iterator[bytes]:
    with _opened(file) as stream:
        number = 0
        while line := stream.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                problem = f"{file}, line {number}, has more than {LONGEST_LINE / 1e6:.0f} MB"
                raise ValueError(f"{problem}; each line is one document: cut it, or put line ends between them")
            yield line


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked while they are read. ValueError, naming it, if it cannot be unpacked."""
    unpack = _unpacker(file)
    if unpack is None:
        with file.open("rb") as plain:
            yield plain
        return
    try:
        with unpack(file) as unpacked:
            yield unpacked
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{file} cannot be unpacked ({error}); restore it from a copy, or pack it anew") from None


def _unpacker(file: Path) -> Callable[[Path], BinaryIO] | None:
    """How a file is unpacked, as its first bytes tell; None if it is not packed."""
    with file.open("rb") as opened:
        start = opened.read(10)
    return next((unpack for first, unpack in _UNPACKERS.items() if re.match(first, start, re.DOTALL)), None)


def _unpack_zstd(file: Path) -> BinaryIO:
    import pyarrow as pa  # comes with `datasets`; unlike the package zstandard it tells a truncated file

    return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(file), compression="zstd")))


_UNPACKERS: dict[bytes, Any] = {
    rb"\x1f\x8b": gzip.open,
    rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18": _unpack_zstd,
    rb"\xfd7zXZ\x00": lzma.open,
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": bz2.open,
}
