"""Datasets of the Hugging Face Hub, or on disk as `datasets` saves them, each row a document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_moe.config import ConfigError, require
from dit_moe.data.huggingface import load_split
from dit_moe.formatting import one_line
from dit_moe.registry import did_you_mean
from dit_moe.text.corpora import CORPORA, Corpus, SourceConfig, source_of


@dataclass(frozen=True, kw_only=True)
class HuggingFaceTextConfig(SourceConfig):
    """`train` and `heldout` name splits of the dataset."""

    id: str  # on the Hub, or a folder
    subset: str | None = None  # if the dataset has several
    train: str = "train"
    heldout: str | None = None
    field: str = "text"  # column
    streaming: bool = True  # read over the network during tokenisation, without keeping a copy on disk

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.heldout != self.train, self, "heldout", "is trained on; name another split, or set heldout_every")


@CORPORA.register("huggingface", HuggingFaceTextConfig)
class HuggingFaceText(Corpus):
    """Documents in the order of the dataset's rows.

    The fingerprint is of the split's size as the dataset states it; streams often do not.

    Raises ConfigError: `datasets` is not installed or cannot load the split (offline, for instance), or it has no such
    column.
    """

    def __init__(self, config: HuggingFaceTextConfig, split: str) -> None:
        super().__init__(split, config)
        option, self.name = source_of(config, split, train="train")
        self.config = config
        self.unchecked_options = ("streaming", "heldout" if option == "train" else "train")
        self.dataset = load_split(config.id, config.subset, option, self.name, config.streaming)
        known = self.dataset.column_names
        if known is not None and config.field not in known:
            problem = f"={config.field} is not a column of {config.id}"
            raise ConfigError("field", f"{problem}; {did_you_mean(config.field, known)}")
        self.fingerprint = _fingerprint(self.dataset, self.name)

    @staticmethod
    def is_remote(config: HuggingFaceTextConfig) -> bool:
        return not Path(config.id).exists()

    def read(self, start: int) -> Iterator[tuple[str, str | None]]:
        field, number = self.config.field, start
        rows = iter(self.dataset.skip(start))
        while True:
            where = f"{self.config.id}, {self.name}, row {number}"
            try:
                row = next(rows, None)
            except Exception as error:  # of many kinds: of Arrow, JSON, UTF-8, packed files, the network
                raise ValueError(
                    f"{where} cannot be read: {one_line(str(error), 300)}; mend the file, or leave it out"
                ) from None
            if row is None:
                return
            text = row.get(field)
            if text is None:
                self.without_text(f"{where} has {'null in the' if field in row else 'no'} column {field!r}")
            elif not isinstance(text, str):
                remedy = "choose another field, or leave such rows out"
                raise ValueError(f"{where} has {type(text).__name__} in the column {field!r}, not text; {remedy}")
            yield where, text
            number += 1


def _fingerprint(rows: Any, split: str) -> str | None:
    known = (rows.info.splits or {}).get(split)
    count = len(rows) if hasattr(rows, "__len__") else getattr(known, "num_examples", None)
    if not count:
        return None
    content = [split, count, getattr(known, "num_bytes", None)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
