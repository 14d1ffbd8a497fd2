"""What a corpus is: documents of text in a fixed order, read one after the other from any place on."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dit_moe.config import ConfigError, require
from dit_moe.data.links import goes_on
from dit_moe.registry import Registry, did_you_mean

CORPORA = Registry("corpus")  # CORPORA.build(config, split)
SPLITS = ("train", "heldout")


class Corpus(ABC):
    """One split of a corpus. `CORPORA.build(config, split)` makes one; ValueError if there is no such split.

    `heldout_every` n: documents n − 1, 2n − 1, … of the source are the split `heldout`, all others `train`.
    `first` n: the source ends behind its first n documents, of both splits.
    """

    # Of what the source holds, as far as names and sizes tell, wherever it lies; None: it cannot be known beforehand.
    fingerprint: str | None
    size: int | None = None  # bytes to read, as far as it is known
    # Options that leave the split's text as it is: they are of the other split, or of places, which the fingerprint
    # stands for.
    free: Collection[str] = ()

    def __init__(self, split: str, heldout_every: int | None = None, first: int | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"a corpus has no split {split!r}; {did_you_mean(split, SPLITS)}")
        self.split, self.heldout_every, self.first = split, heldout_every, first

    @staticmethod
    def is_remote(config: Any) -> bool:
        """Whether it takes the network to make one of `config`."""
        return False

    @abstractmethod
    def read(self, start: int) -> Iterator[tuple[str, str]]:
        """The documents of the source, whatever the split, from number `start` on: where one stands, and its text.

        Raises ValueError, naming the place, for what is no text.
        """

    def documents(self, start: int = 0) -> Iterator[str]:
        """The texts of the split from number `start` on. ValueError, naming the place, for what is no text."""
        begin = self._number(start)
        left = None if self.first is None else max(0, self.first - begin)
        for number, (where, text) in enumerate(islice(self.read(begin), left), begin):
            if self._holds(number):
                _require_unicode(text, where)
                yield text

    def _holds(self, number: int) -> bool:
        """Whether document `number` of the source is in this split."""
        every = self.heldout_every
        return every is None or (number % every == every - 1) == (self.split == "heldout")

    def _number(self, place: int) -> int:
        """The number, in the source, of a document of this split."""
        every = self.heldout_every
        if every is None:
            return place
        if self.split == "heldout":
            return place * every + every - 1
        return place + place // (every - 1)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A corpus in files that `train` and `heldout` are read from, or that every so many-th document is held out of."""

    heldout_every: int | None = None
    first: int | None = None  # read so many documents of the source, whatever their split; None: all

    def __post_init__(self) -> None:
        require(self.first is None or self.first >= 1, self, "first", "must be at least 1, or null for all")
        require(self.heldout_every is None or self.heldout_every >= 2, self, "heldout_every", "must be at least 2")
        if self.heldout_every is not None and getattr(self, "heldout", None) is not None:
            problem = f"={self.heldout_every} and heldout both say what is held out"
            raise ConfigError("heldout_every", f"{problem}; drop one of the lines")


def source_of(config: Any, split: str, train: str) -> tuple[str, str]:
    """The option that says where a split is read from (`train` is the one of the training split), and what it says."""
    own = {"train": train, "heldout": train if config.heldout_every else "heldout"}
    option = own.get(split, train)
    if getattr(config, option) is None:
        remedy = "name held-out text, or set heldout_every to hold out every so many-th document"
        raise ConfigError(option, f" is missing; {remedy}")
    require(getattr(config, option) != "", config, option, "is empty; say where the text is")
    return option, getattr(config, option)


def find_files(config: Any, split: str, suffixes: Sequence[str]) -> list[Path]:
    """The files of a split, in order: one, or those that match a pattern, or those in a folder with such suffixes.

    Raises ConfigError if there are none, or one is of both splits.
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
    named = path if path.is_dir() else Path(re.split(r"[*?[]", place)[0] + "x").parent  # what a user named as it is
    if path.is_dir():
        found = [each for each in path.rglob("*") if each.name.endswith(tuple(suffixes))]
    else:
        found = [path] if path.is_file() else [Path(each) for each in glob.glob(place, recursive=True)]
    folders = {folder for each in found for folder in each.parents if folder != named and folder.is_relative_to(named)}
    around = {folder for folder in folders if not goes_on(str(folder))}
    return sorted(each for each in found if each.is_file() and around.isdisjoint(each.parents))


def fingerprint_of(files: Sequence[Path]) -> str:
    """Of the names below the folder that all are in, and the sizes."""
    shared = files[0].parent
    while not all(each.is_relative_to(shared) for each in files):
        shared = shared.parent
    listing = [(each.relative_to(shared).as_posix(), each.stat().st_size) for each in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def decoded(raw: bytes, where: str, offset: int = 0) -> str:
    """UTF-8 as text, every letter as it stands; ValueError, naming the byte (raw begins at `offset`), if it is none."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        problem = f"{where} is not UTF-8: byte 0x{raw[error.start]:02x} at position {offset + error.start}"
        raise ValueError(f"{problem}; convert it (for instance with iconv), or leave it out") from None


def _require_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"half a character (the lone surrogate U+{ord(text[error.start]):04X})"
        raise ValueError(f"{where} holds {half} at letter {error.start} of its text; mend or remove it") from None
