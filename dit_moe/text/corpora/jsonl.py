"""Files of JSON lines, each line a document."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from dit_moe.registry import did_you_mean
from dit_moe.text.corpora.base import CORPORA, Corpus, SourceConfig, decoded, find_files, fingerprint_of


@dataclass(frozen=True, kw_only=True)
class JsonLinesConfig(SourceConfig):
    """`path` and `heldout`: a file, a pattern, or a folder; files that end in .gz are unpacked while they are read."""

    path: str
    heldout: str | None = None
    field: str = "text"  # of a line's object


@CORPORA.register("jsonl", JsonLinesConfig)
class JsonLines(Corpus):
    """Documents in the order of the files' paths and of the lines in them. Blank lines are none."""

    free = ("path", "heldout")

    def __init__(self, config: JsonLinesConfig, split: str) -> None:
        super().__init__(split, config.heldout_every, config.first)
        self.field = config.field
        self.files = find_files(config, split, (".jsonl", ".jsonl.gz"))
        self.fingerprint = fingerprint_of(self.files)
        if not any(_is_packed(file) for file in self.files):
            self.size = sum(file.stat().st_size for file in self.files)

    def read(self, start: int) -> Iterator[tuple[str, str]]:
        for file in self.files:
            position = 0
            for number, line in enumerate(_lines(file), 1):
                if line.strip():
                    if start > 0:  # passed over without a look into it
                        start -= 1
                    else:
                        where = f"{file}, line {number},"
                        yield where, self._text(decoded(line, where, position), where)
                position += len(line)

    def _text(self, line: str, where: str) -> str:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}; mend or remove it") from None
        except RecursionError:
            raise ValueError(f"{where} is not JSON that can be read: too deep; mend or remove it") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no JSON object but {type(row).__name__}; mend or remove it")
        if self.field not in row:
            raise ValueError(f"{where} has no field {self.field!r}; {did_you_mean(self.field, row)}")
        if not isinstance(row[self.field], str):
            kind = type(row[self.field]).__name__
            raise ValueError(f"{where} has no text in the field {self.field!r} but {kind}; mend or remove it")
        return row[self.field]


def _is_packed(file: Path) -> bool:
    return file.suffix == ".gz"


def _lines(file: Path) -> Iterator[bytes]:
    """ValueError if a packed file is damaged."""
    with cast(IO[bytes], gzip.open(file) if _is_packed(file) else file.open("rb")) as opened:
        try:
            yield from opened
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{file} cannot be unpacked ({error}); restore it") from None
