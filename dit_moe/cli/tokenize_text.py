"""Tokenise the text of a config's section `tokenize` into the folders that its section `data` names.

Running the same command again goes on where it stopped, and the tokens are the same however often that was.

    dit-moe tokenize lm_tiny
    dit-moe tokenize lm_tiny --verify
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dit_moe.cli import add_config_arguments
from dit_moe.cli.ending import end
from dit_moe.distributed import on_main
from dit_moe.experiments.text import load_text_experiment
from dit_moe.text.splits import tokenize_splits, verify_splits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    add_config_arguments(parser, "lm_tiny")
    parser.add_argument("--split", choices=("train", "heldout"), help="only this one")
    parser.add_argument("--verify", action="store_true", help="read the tokens that are there, and check all of them")


def run(args: argparse.Namespace) -> None:
    """Tokenise or verify, and print a summary as JSON. ValueError for bad input."""
    experiment = load_text_experiment(args.config, args.overrides)
    if args.verify:
        on_main(lambda: print(json.dumps(verify_splits(experiment.data, args.split), indent=1)))
    else:
        facts = tokenize_splits(experiment.tokenize, experiment.data, args.split)
        on_main(lambda: print(json.dumps(facts, indent=1)))
    config, verify = (args.config, *args.overrides), [] if args.verify else ["--verify"]
    folders = {"train": experiment.data.path, "heldout": experiment.data.heldout}
    made = [Path(folder) for split, folder in folders.items() if folder and args.split in (None, split)]
    end(made, *[("tokenize", *config, each) for each in verify], ("train", *config))
