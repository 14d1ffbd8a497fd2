"""Corpora in files: text files, each of them a document, or JSON lines, each line a document."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from dit_moe.config import ConfigError
from dit_moe.data.base import is_to_follow
from dit_moe.registry import did_you_mean
from dit_moe.text.corpora import CORPORA, Corpus, SourceConfig, decode_utf8, source_of


@dataclass(frozen=True, kw_only=True)
class FilesConfig(SourceConfig):
    """`path` and `heldout`: a file, a pattern such as books/**/*.txt, or a folder of .txt and .md files."""

    path: str
    heldout: str | None = None


@dataclass(frozen=True, kw_only=True)
class JsonLinesConfig(FilesConfig):
    """`path` and `heldout`: a file, a pattern, or a folder; files that end in .gz are unpacked while they are read."""

    field: str = "text"  # of a line's object


class _FileCorpus(Corpus):
    """Documents in the order of the files' paths."""

    unchecked_options = ("path", "heldout")
    suffixes: tuple[str, ...]

    def __init__(self, config: FilesConfig, split: str) -> None:
        super().__init__(split, config.heldout_every, config.first)
        self.files = find_files(config, split, self.suffixes)
        self.fingerprint = fingerprint_of(self.files)
        if not any(file.suffix == ".gz" for file in self.files):
            self.size = sum(file.stat().st_size for file in self.files)


@CORPORA.register("files", FilesConfig)
class Files(_FileCorpus):
    """Each file is a document."""

    suffixes = (".txt", ".md")

    def read(self, start: int) -> Iterator[tuple[str, str]]:
        for file in self.files[start:]:
            yield str(file), decode_utf8(file.read_bytes(), str(file))


@CORPORA.register("jsonl", JsonLinesConfig)
class JsonLines(_FileCorpus):
    """Each line is a document; blank lines are left out."""

    suffixes = (".jsonl", ".jsonl.gz")

    def __init__(self, config: JsonLinesConfig, split: str) -> None:
        super().__init__(config, split)
        self.field = config.field

    def read(self, start: int) -> Iterator[tuple[str, str]]:
        for file in self.files:
            position = 0
            for number, line in enumerate(_lines(file), 1):
                if line.strip():
                    if start > 0:  # skipped without reading it
                        start -= 1
                    else:
                        where = f"{file}, line {number},"
                        yield where, self._text(decode_utf8(line, where, position), where)
                position += len(line)

    def _text(self, line: str, where: str) -> str:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}; mend or remove it") from None
        except RecursionError:
            raise ValueError(f"{where} is not JSON that can be read: too deep; mend or remove it") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not a JSON object but {type(row).__name__}; mend or remove it")
        if self.field not in row:
            raise ValueError(f"{where} has no field {self.field!r}; {did_you_mean(self.field, row)}")
        if not isinstance(row[self.field], str):
            kind = type(row[self.field]).__name__
            raise ValueError(f"{where} has no text in the field {self.field!r} but {kind}; mend or remove it")
        return row[self.field]


def find_files(config: FilesConfig, split: str, suffixes: Sequence[str]) -> list[Path]:
    """The files of a split, in order: one, or those that match a pattern, or those in a folder with such suffixes.

    Raises ConfigError if there are none, or if one belongs to both splits.
    """
    option, place = source_of(config, split, train="path")
    files = _matching(place, suffixes)
    if not files:
        problem = f"={place} names no files of text"
        raise ConfigError(option, f"{problem}; name a file, a pattern, or a folder of {' or '.join(suffixes)} files")
    if config.heldout is not None:
        held_out = {each.resolve() for each in _matching(config.heldout, suffixes)}
        for each in _matching(config.path, suffixes):
            if each.resolve() in held_out:
                problem = f"={config.heldout} names {each}, which path={config.path} names too"
                raise ConfigError("heldout", f"{problem}; name text that is not trained on, or set heldout_every")
    return files


def _matching(place: str, suffixes: Sequence[str]) -> list[Path]:
    path = Path(place)
    named = path if path.is_dir() else Path(re.split(r"[*?[]", place)[0] + "x").parent  # the part without wildcards
    if path.is_dir():
        found = [each for each in path.rglob("*") if each.name.endswith(tuple(suffixes))]
    else:
        found = [path] if path.is_file() else [Path(each) for each in glob.glob(place, recursive=True)]
    folders = {folder for each in found for folder in each.parents if folder != named and folder.is_relative_to(named)}
    around = {folder for folder in folders if not is_to_follow(str(folder))}
    return sorted(each for each in found if each.is_file() and around.isdisjoint(each.parents))


def fingerprint_of(files: Sequence[Path]) -> str:
    """A hash of the files' sizes, and of their names below the folder that they share."""
    shared = os.path.commonpath([each.parent for each in files])
    listing = [(each.relative_to(shared).as_posix(), each.stat().st_size) for each in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _lines(file: Path) -> Iterator[bytes]:
    """ValueError if a packed file is damaged."""
    with cast(IO[bytes], gzip.open(file) if file.suffix == ".gz" else file.open("rb")) as opened:
        try:
            yield from opened
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{file} cannot be unpacked ({error}); restore it") from None
