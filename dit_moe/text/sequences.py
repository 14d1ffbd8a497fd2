"""The rows of tokens that training takes from a folder of token shards."""

# B batch, L tokens that the model sees

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from dit_moe.config import ConfigError, Place, require
from dit_moe.data.base import place_of
from dit_moe.text.token_shards import TokenManifest, TokenShards
from dit_moe.text.tokenizer import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """Folders of token shards, and how training reads them."""

    path: Annotated[str, Place()]
    heldout: Annotated[str, Place()] | None = None  # another such folder, for the split `heldout`
    length: int = 2048  # tokens the model sees at once
    document_mask: bool = False  # tokens attend to their own document only
    fingerprint: str | None = None  # (recorded) of what is in the folder

    def __post_init__(self) -> None:
        require(self.length >= 1, self, "length", "must be at least 1")


class TokenSequences:
    """Row i holds tokens i·L … i·L + L, so that each of the last L is predicted once; neighbours share one token.

    Raises:
        NoTokens: nothing was tokenised into the folder, or not to the end.
        ConfigError: no such split, or the folder holds less than one row.
        ValueError: files are damaged.
    """

    def __init__(self, config: TokensConfig, split: str) -> None:
        self.config = config
        self.shards = open_shards(config, split)
        if len(self) < 1:
            tokens = len(self.shards)
            problem = f"={config.length} is longer than the data: {self.shards.folder} has {tokens:,} tokens"
            remedy = f"set data.length to at most {tokens - 1}, or tokenise more text"
            raise ConfigError("length", f"{problem}, and a row needs one more than its length; {remedy}")

    def __len__(self) -> int:
        return (len(self.shards) - 1) // self.config.length

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """{"tokens": int64 [B, L + 1]}, and with `document_mask` "documents": int64 [B, L + 1].

        That is which of the documents in its row a token is of; the end of text is of the document behind it.
        """
        length = self.config.length
        tokens = np.empty((len(indices), length + 1), dtype=np.int64)
        for row, i in zip(tokens, indices, strict=True):
            self.shards.read(i * length, row)
        if tokens.size and (largest := int(tokens.max())) > self.manifest.largest:
            problem = f"{self.shards.folder} has the token {largest} where its manifest knows of none above"
            raise ValueError(f"{problem} {self.manifest.largest}; a shard was changed, see `dit-moe tokenize --verify`")
        rows = {"tokens": torch.from_numpy(tokens)}
        if self.config.document_mask:
            rows["documents"] = (rows["tokens"] == self.shards.eos).cumsum(1)
        return rows

    @property
    def manifest(self) -> TokenManifest:
        return self.shards.manifest

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def tokenizer(self) -> TextTokenizer:
        """The one that made the tokens, from their folder."""
        return self.shards.tokenizer()


def open_shards(config: TokensConfig, split: str) -> TokenShards:
    """The tokens of a split. Raises what `TokenShards` raises; ConfigError if the split has no folder."""
    return TokenShards(folder_of(config, split), "data.path" if split == "train" else "data.heldout")


def folder_of(config: TokensConfig, split: str) -> Path:
    """The folder of a split; ConfigError if there is none."""
    return Path(place_of(config, split, "tokens")[1])
