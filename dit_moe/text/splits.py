"""Tokenising and verifying the splits that a config names, and a summary of each."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from dit_moe.config import ConfigError, section
from dit_moe.data.listing import note
from dit_moe.distributed import from_main, join_processes, locked, on_main
from dit_moe.formatting import significant, tell
from dit_moe.progress import work_bar
from dit_moe.text.losses import not_comparable
from dit_moe.text.sequences import TokensConfig, folder_of, open_shards
from dit_moe.text.token_shards import TokenManifest, TokenShards, count_repeated
from dit_moe.text.tokenization import Tokenization, TokenizeConfig, finished

MB = 1e6


def tokenize_splits(
    config: TokenizeConfig | None, data: TokensConfig, split: str | None = None
) -> dict[str, dict[str, Any]]:
    """Make what is missing of the tokens of all splits, or of one; returns a summary of each.

    Raises what `Tokenization` and its `run` raise; ConfigError if the section `tokenize` is missing.
    """
    names = _chosen(data, split)
    for name in names[1:]:
        if config is not None:
            on_main(partial(_require_usable, config, folder_of(data, name), name))
    made = {name: _tokenize_split(config, data, name) for name in names}
    if len(made) > 1 and not all("already_there" in each for each in made.values()):
        shards = [TokenShards(folder_of(data, name)) for name in made]
        repeated, of = from_main(lambda: count_repeated(*shards)), made["heldout"]["documents"]
        made["heldout"]["also_trained_on"] = repeated
        if repeated:
            problem = f"{repeated:,} of the {of:,} held-out documents are in the training text too"
            note(f"{problem}: data.heldout={data.heldout}")
    return made


def verify_splits(data: TokensConfig, split: str | None = None) -> dict[str, dict[str, Any]]:
    """Verify the tokens of all splits, or of one; returns a summary of each.

    ValueError if anything is not as it was written.
    """
    return {name: _verify_split(data, name) for name in _chosen(data, split)}


def _chosen(data: TokensConfig, split: str | None) -> list[str]:
    if split is not None:
        return [split]
    return ["train"] if data.heldout is None else ["train", "heldout"]


def _require_usable(config: TokenizeConfig, folder: Path, split: str) -> None:
    """Raises, before another split is made, what making this one would raise at its beginning."""
    if finished(config, folder, split) is None:
        Tokenization(config, folder, split).look_ahead()


def _tokenize_split(config: TokenizeConfig | None, data: TokensConfig, split: str) -> dict[str, Any]:
    if config is None:
        raise ConfigError("tokenize", " is missing; say which text, for instance tokenize.corpus.name=python_docs")
    with section("data"):
        folder = folder_of(data, split)
    manifest = from_main(lambda: finished(config, folder, split))
    if manifest is not None:
        _say_losses(manifest, split)
        return _summary(folder, manifest) | {"shards_made": 0, "already_there": True}
    with locked(folder):
        task, start = Tokenization(config, folder, split), time.perf_counter()
        size = task.corpus.size
        with work_bar(f"tokenising {split}", None if size is None else size / MB, "MB") as advance:
            manifest = task.run(lambda text_bytes: advance(text_bytes / MB))
    _say_losses(manifest, split)
    seconds = time.perf_counter() - start
    return _summary(folder, manifest) | {
        "shards_made": task.made,
        "seconds": round(seconds, 3),
        "mb_per_s": significant(task.text_bytes / MB / seconds),
    }


def _say_losses(manifest: TokenManifest, split: str) -> None:
    """One line on stderr for what was left out, and one if the tokenizer loses text."""
    if not join_processes().is_main_process or manifest.losses is None:
        return
    if left_out := manifest.losses.describe_left_out():
        tell(f"tokenising {split}: {left_out} are left out")
    for reason in not_comparable(manifest.losses, manifest.tokenizer["name"]):
        tell(f"warning: {split}: {reason}; bits per byte of it cannot be compared")


def _verify_split(data: TokensConfig, split: str) -> dict[str, Any]:
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
        "losses": None if manifest.losses is None else manifest.losses.dump(),
    }
