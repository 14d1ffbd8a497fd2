"""Train an AutoencoderKL on the images of a data set, and export it in diffusers' layout.

Running the same command again goes on where it stopped. What is exported is the averaged network; a config's section
`first_stage` takes the folder: ``first_stage: {name: autoencoder, model: runs/autoencoder_digits/autoencoder}``.

    dit-moe train-autoencoder autoencoder_digits train.steps=3000 --export autoencoders/digits
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dit_moe.cli import add_config_arguments, add_run_argument
from dit_moe.cli.ending import end
from dit_moe.tasks.autoencoder import EXPORTED, RECONSTRUCTIONS, prepare, train_and_export
from dit_moe.tasks.train import run_folder
from dit_moe.training.curves_of_runs import CURVES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    add_config_arguments(parser, "autoencoder_digits")
    add_run_argument(parser)
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="where the autoencoder goes; default RUN/autoencoder"
    )


def run(args: argparse.Namespace) -> None:
    """Train, export, and print as JSON what was exported and how well it reconstructs."""
    settings, images = prepare(args.config, args.overrides)
    run = run_folder(args.config, args.folder)
    report = train_and_export(settings, images, run, args.export)
    if report is not None:
        print(json.dumps(report, indent=1))
    exported = args.export or run / EXPORTED
    first_stage = f"first_stage={{name: autoencoder, model: {json.dumps(str(exported))}}}"
    end([run, exported, run / RECONSTRUCTIONS, run / CURVES], ("encode", "CONFIG", first_stage))
