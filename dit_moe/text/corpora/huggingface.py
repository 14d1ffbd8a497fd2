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
        super().__init__(split, config.heldout_every, config.first)
        option, self.name = source_of(config, split, train="train")
        self.config = config
        self.unchecked_options = ("streaming", "heldout" if option == "train" else "train")
        self.rows = load_split(config.id, config.subset, option, self.name, config.streaming)
        known = self.rows.column_names
        if known is not None and config.field not in known:
            problem = f"={config.field} is not a column of {config.id}"
            raise ConfigError("field", f"{problem}; {did_you_mean(config.field, known)}")
        self.fingerprint = _fingerprint(self.rows, self.name)

    @staticmethod
    def is_remote(config: HuggingFaceTextConfig) -> bool:
        return not Path(config.id).exists()

    def read(self, start: int) -> Iterator[tuple[str, str]]:
        field = self.config.field
        for number, row in enumerate(self.rows.skip(start), start):
            text = row.get(field)
            if not isinstance(text, str):
                found = f"{type(text).__name__} in the column {field!r}" if field in row else f"no column {field!r}"
                remedy = "choose another field, or leave such rows out"
                raise ValueError(f"{self.config.id}, {self.name}, row {number} has {found}, not text; {remedy}")
            yield f"{self.config.id}, {self.name}, row {number}", text


def _fingerprint(rows: Any, split: str) -> str | None:
    known = (rows.info.splits or {}).get(split)
    count = len(rows) if hasattr(rows, "__len__") else getattr(known, "num_examples", None)
    if not count:
        return None
    content = [split, count, getattr(known, "num_bytes", None)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
