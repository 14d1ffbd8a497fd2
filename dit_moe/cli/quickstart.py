"""Encode if the config has latents, train, sample with several seeds, evaluate, and show what came out.

A language model's text is tokenised; it is trained, scored on held-out documents beside a trigram model, and writes.

    dit-moe quickstart digits
    dit-moe quickstart lm_tiny
    dit-moe quickstart photos

A folder of images, one folder per class, stands for the config my_images with data.path=photos; images alone are one
class. See docs/own-images.md.
Everything goes into runs/<name of the config, or of the folder>/; a second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse

from dit_moe.built_in import find
from dit_moe.cli import add_config_arguments, add_run_argument
from dit_moe.cli.ending import end
from dit_moe.tasks import task_of
from dit_moe.tasks.train import SUMMARY_FILES, load, quickstart, run_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    add_config_arguments(parser, "digits")
    add_run_argument(parser)
    parser.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave out images that cannot be read",
    )


def run(args: argparse.Namespace) -> None:
    """Do all of it and write metrics.json, curves.png and grid.png, or sample.json of text, into the run folder."""
    args.folder = run_folder(args.config, args.folder, args.overrides)
    experiment = load(args.config, args.overrides)
    quickstart(experiment, args.folder, find(args.config).name, skip_broken=args.skip_broken)
    files = (*task_of(experiment).sample_files, *SUMMARY_FILES)
    routing = [] if experiment.model.moe is None else [("routing", args.folder)]
    more = ("sample", args.folder, "--out", args.folder / "more")  # beside the samples that were judged
    end([args.folder, *(args.folder / name for name in files)], more, *routing)
