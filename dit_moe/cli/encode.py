"""Encode the images of a config's section `encode` into the latents that its section `data` reads.

Running the same command again goes on where it stopped. Started by torchrun or accelerate it uses every process, and
the latents are the same whatever their number, on the same kind of device, with the same number of threads per process.

    dit-moe encode digits_latent
    dit-moe encode digits_latent --verify
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dit_moe.autoencoders.encode import encode, verify_latents
from dit_moe.checkpoint import is_run
from dit_moe.cli import add_config_arguments
from dit_moe.cli.ending import end
from dit_moe.distributed import on_main
from dit_moe.experiments.image import load_experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    add_config_arguments(parser, "digits_latent")
    parser.add_argument(
        "--split", choices=("train", "heldout"), default="train", help="heldout goes into the folder data.heldout"
    )
    parser.add_argument(
        "--skip-broken", action="store_true", help="leave out images that cannot be read; the manifest lists them"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="check all shards, and decode a few into verify.png beside their originals",
    )


def run(args: argparse.Namespace) -> None:
    """Encode or verify, and print a summary as JSON. ValueError for bad input, before the work starts."""
    experiment = load_experiment(args.config, args.overrides)
    config = (args.config, *args.overrides)
    # The config of a run is not trained from again: its latents are for an evaluation, or for `upcycle`.
    train = [] if is_run(Path(args.config).parent) else [("train", *config)]
    if args.verify:
        facts = on_main(lambda: verify_latents(experiment, args.split))
        results, following = [Path(facts["picture"])] if facts else [], train
    else:
        facts = encode(experiment, args.split, args.skip_broken)
        of_split = () if args.split == "train" else ("--split", args.split)
        results, following = [Path(facts["folder"])], [("encode", *config, *of_split, "--verify"), *train]
    on_main(lambda: print(json.dumps(facts, indent=1)))
    end(results, *following)
