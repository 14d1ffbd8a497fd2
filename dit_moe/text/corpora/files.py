"""Corpora in files: text files, each of them a document, or JSON lines, each line a document."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from dit_moe.config import ConfigError
from dit_moe.data.listing import OTHER_KINDS, PassedOver, list_files, merged, never_counts, say_passed_over
from dit_moe.registry import did_you_mean
from dit_moe.text.corpora import CORPORA, Corpus, SourceConfig, decode_utf8, source_of

_NOT_NAMED = "files that the pattern does not name"  # which a user knows


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
        self.files, self.passed_over = find_files(config, split, self.suffixes)
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
        return _in_folder(place, lambda name, _: None if name.lower().endswith(tuple(suffixes)) else OTHER_KINDS)
    head, *rest = re.split(r"(?:^|(?<=/))\*\*(?:/|$)", place, maxsplit=1)
    if not rest:
        named = [each for each in glob.glob(place) if os.path.isfile(each) and not never_counts(os.path.basename(each))]
        return sorted(map(Path, named)), {}
    pattern = rest[0] or "*"
    places = [each for each in glob.glob(head or ".") if os.path.isdir(each)]
    found = [_in_folder(each, lambda _, path: None if Path(path).match(pattern) else _NOT_NAMED) for each in places]
    return sorted(file for files, _ in found for file in files), merged(passed_over for _, passed_over in found)


def _in_folder(folder: str, why_not: Callable[[str, str], str | None]) -> tuple[list[Path], PassedOver]:
    found = list_files(folder, why_not)
    found.passed_over.pop(_NOT_NAMED, None)
    return sorted(Path(folder, os.fsdecode(file)) for file in found.files), found.passed_over


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
