"""Tokenise the text of a config's section `tokenize` into the folders that its section `data` names.

Running the same command again goes on where it stopped, and the tokens are the same however often that was.

    dit-moe tokenize configs/lm_tiny.yaml
    dit-moe tokenize configs/lm_tiny.yaml --verify
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from dit_moe.cli.config_arguments import add_config_arguments
from dit_moe.config import ConfigError, section
from dit_moe.distributed import locked, on_main
from dit_moe.experiments.text import TextExperiment, load_text_experiment
from dit_moe.files import require_writable
from dit_moe.progress import work_bar
from dit_moe.rounding import significant
from dit_moe.text.sequences import folder_of, open_shards
from dit_moe.text.token_shards import TokenManifest
from dit_moe.text.tokenization import Tokenization, finished

MB = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    add_config_arguments(parser, "configs/lm_tiny.yaml")
    parser.add_argument("--split", choices=("train", "heldout"), help="only this one")
    parser.add_argument("--verify", action="store_true", help="read the tokens that are there, and check all of them")


def run(args: argparse.Namespace) -> None:
    """Tokenise or verify, and print a summary as JSON. ValueError for bad input."""
    experiment = load_text_experiment(args.config, args.overrides)
    splits = splits_of(experiment) if args.split is None else [args.split]
    if args.verify:
        on_main(lambda: _print({split: check(experiment, split) for split in splits}))
    else:
        facts = {split: tokenize_split(experiment, split) for split in splits}
        on_main(lambda: _print(facts))


def splits_of(experiment: TextExperiment) -> list[str]:
    """The splits that the experiment has folders for."""
    return ["train"] if experiment.data.heldout is None else ["train", "heldout"]


def tokenize_all(experiment: TextExperiment) -> dict[str, dict[str, Any]]:
    """Make what is missing of the tokens of both splits; returns a summary of each.

    ValueError if the section `tokenize` is missing, or for bad text.
    """
    return {split: tokenize_split(experiment, split) for split in splits_of(experiment)}


def tokenize_split(experiment: TextExperiment, split: str) -> dict[str, Any]:
    """Make the tokens of a split, or what is missing of them; returns a summary. Finished ones are left alone."""
    if experiment.tokenize is None:
        raise ConfigError("tokenize", " is missing; say which text, for instance tokenize.corpus.name=python_docs")
    with section("data"):
        folder = folder_of(experiment.data, split)
    there = finished(experiment.tokenize, folder, split)
    if there is not None:
        return _summary(folder, there) | {"shards_made": 0, "already_there": True}
    require_writable(folder)
    with locked(folder):
        task, start = Tokenization(experiment.tokenize, folder, split), time.perf_counter()
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


def check(experiment: TextExperiment, split: str) -> dict[str, Any]:
    """Verify the tokens of a split; returns a summary. ValueError if anything is not as it was written."""
    with section("data"):
        tokens = open_shards(experiment.data, split)
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


def _print(facts: dict[str, Any]) -> None:
    print(json.dumps(facts, indent=1))
