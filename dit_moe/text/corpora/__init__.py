"""What a corpus is: documents of text in a fixed order, read one after the other from any place on.

A new corpus is a new file here: it registers itself and every contract test runs on it unasked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from dit_moe.config import ConfigError, require
from dit_moe.registry import Registry, did_you_mean, import_submodules

CORPORA = Registry("corpus")  # CORPORA.build(config, split)
SPLITS = ("train", "heldout")
MARK = "\ufeff"  # byte-order mark: some editors and spreadsheets write it before a text


class Row(NamedTuple):
    """A document of a corpus; `text` is None if it has none and is left out."""

    text: str | None
    marked: bool = False  # a byte-order mark stood before the text, and is left out


class Corpus(ABC):
    """One split of a corpus. `CORPORA.build(config, split)` makes one; ValueError if there is no such split.

    `heldout_every` n: documents n − 1, 2n − 1, … of the source are the split `heldout`, all others `train`.
    `first` n: the source ends behind its first n documents, of both splits.
    `skip_null`: documents that are null, missing or empty are left out; they count among those of the source.
    """

    fingerprint: str | None  # of the source's content as far as names and sizes tell, not of its place; None: unknown
    size: int | None = None  # bytes to read, if known
    unchecked_options: Collection[str] = ()  # that may change: of the other split, or places that `fingerprint` covers

    def __init__(self, split: str, source: SourceConfig | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"a corpus has no split {split!r}; {did_you_mean(split, SPLITS)}")
        source = source or SourceConfig()
        self.split, self.heldout_every, self.first = split, source.heldout_every, source.first
        self.skip_null = source.skip_null

    @staticmethod
    def is_remote(config: Any) -> bool:
        """Whether it takes the network to make one of `config`."""
        return False

    @abstractmethod
    def read(self, start: int) -> Iterator[tuple[str, str | None]]:
        """The documents of the source, of all splits, from number `start` on: the place of each, and its text.

        The text is None where there is none; `without_text` decides about that. Raises ValueError, naming the place,
        for what is not text.
        """

    def without_text(self, problem: str) -> None:
        """ValueError for a document that is no text, unless such are to be left out."""
        if not self.skip_null:
            raise ValueError(f"{problem}; mend or remove it, or set tokenize.corpus.skip_null=true")

    def rows(self, start: int = 0) -> Iterator[Row]:
        """What follows the first `start` documents with text of the split, documents without text included.

        Raises ValueError, naming the place, for what is not text.
        """
        begin, passed = (0, start) if self.skip_null else (self._number(start), 0)
        left = None if self.first is None else max(0, self.first - begin)
        for number, (where, text) in enumerate(islice(self.read(begin), left), begin):
            if not self._holds(number):
                continue
            marked = text is not None and text.startswith(MARK)
            text = text.removeprefix(MARK) if text is not None else None
            if text is None or (self.skip_null and not text):
                if not passed:
                    yield Row(None, marked)
            elif passed:
                passed -= 1
            else:
                _require_unicode(text, where)
                yield Row(text, marked)

    def documents(self, start: int = 0) -> Iterator[str]:
        """The texts of the split from number `start` on. ValueError, naming the place, for what is not text."""
        return (row.text for row in self.rows(start) if row.text is not None)

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
    """A source with documents of its own for each split, or whose every n-th document is held out."""

    heldout_every: int | None = None
    first: int | None = None  # read only the first n documents of the source, of all splits; None: all
    skip_null: bool = False  # leave out documents without text (null, missing, empty), and count them

    def __post_init__(self) -> None:
        require(self.first is None or self.first >= 1, self, "first", "must be at least 1, or null for all")
        require(self.heldout_every is None or self.heldout_every >= 2, self, "heldout_every", "must be at least 2")
        if self.heldout_every is not None and getattr(self, "heldout", None) is not None:
            problem = f"={self.heldout_every} and heldout both say what is held out"
            raise ConfigError("heldout_every", f"{problem}; drop one of the lines")


def source_of(config: Any, split: str, train: str) -> tuple[str, str]:
    """The option that says where a split is read from, and its value; `train` is the option of the training split."""
    option = "heldout" if split == "heldout" and not config.heldout_every else train
    if getattr(config, option) is None:
        remedy = "name held-out text, or set heldout_every to hold out every n-th document"
        raise ConfigError(option, f" is missing; {remedy}")
    require(getattr(config, option) != "", config, option, "is empty; say where the text is")
    return option, getattr(config, option)


def _require_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"half a character (the lone surrogate U+{ord(text[error.start]):04X})"
        raise ValueError(f"{where} holds {half} at letter {error.start} of its text; mend or remove it") from None


import_submodules(__name__, __path__)
