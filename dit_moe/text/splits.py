"""Tokens of the splits of a config: made, or what is missing of them, and verified."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dit_moe.config import ConfigError, section
from dit_moe.distributed import locked
from dit_moe.files import require_writable
from dit_moe.progress import work_bar
from dit_moe.rounding import significant
from dit_moe.text.sequences import TokensConfig, folder_of, open_shards
from dit_moe.text.token_shards import TokenManifest
from dit_moe.text.tokenization import Tokenization, TokenizeConfig, finished

MB = 1e6


def splits_of(data: TokensConfig) -> list[str]:
    """The splits that the section `data` has folders for."""
    return ["train"] if data.heldout is None else ["train", "heldout"]


def tokenize_splits(config: TokenizeConfig | None, data: TokensConfig) -> dict[str, dict[str, Any]]:
    """Make what is missing of the tokens of all splits; returns a summary of each.

    ValueError if the section `tokenize` is missing, or for bad text.
    """
    return {split: tokenize_split(config, data, split) for split in splits_of(data)}


def tokenize_split(config: TokenizeConfig | None, data: TokensConfig, split: str) -> dict[str, Any]:
    """Make the tokens of a split, or what is missing of them; returns a summary. Finished ones are left alone."""
    if config is None:
        raise ConfigError("tokenize", " is missing; say which text, for instance tokenize.corpus.name=python_docs")
    with section("data"):
        folder = folder_of(data, split)
    there = finished(config, folder, split)
    if there is not None:
        return _summary(folder, there) | {"shards_made": 0, "already_there": True}
    require_writable(folder)
    with locked(folder):
        task, start = Tokenization(config, folder, split), time.perf_counter()
        done = 0

        def count(text_bytes: int) -> None:
            nonlocal done
            done += text_bytes
            advance(text_bytes / MB)

        size = task.corpus.size
        with work_bar(f"tokenising {split}", None if size is None else size / MB, "MB") as advance:
            manifest = task.run(count)
    seconds = time.perf_counter() - start
    return _summary(folder, manifest) | {
        "shards_made": task.made,
        "seconds": round(seconds, 3),
        "mb_per_s": significant(done / MB / seconds),
    }


def verify_tokens(data: TokensConfig, split: str) -> dict[str, Any]:
    """Verify the tokens of a split; returns a summary. ValueError if anything is not as it was written."""
    with section("data"):
        tokens = open_shards(data, split)
    with work_bar(f"verifying {split}", tokens.manifest.bytes / MB, "MB") as advance:
        tokens.verify(lambda count: advance(count / MB))
    return _summary(tokens.folder, tokens.manifest) | {"verified": True}


def _summary(folder: Path, manifest: TokenManifest) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "tokens": manifest.tokens,
        "documents": manifest.documents,
        "bytes": manifest.bytes,
        "shards": len(manifest.shards),
        "tokenizer": manifest.tokenizer,
        "description": manifest.describe(),
        "fingerprint": manifest.fingerprint,
    }
