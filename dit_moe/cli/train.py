"""Train the experiment of a config file.

Running the same command again goes on where it stopped. Started by torchrun or accelerate it uses every process.

    dit-moe train digits train.steps=200 --dry-run
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

from dit_moe import config
from dit_moe.cli import add_config_arguments, add_run_argument
from dit_moe.cli.ending import end, scoring
from dit_moe.costs import add_cost_arguments, describe
from dit_moe.downloads import no_downloads
from dit_moe.tasks import task_of
from dit_moe.tasks.train import dry_run, load, prepare, run_folder, train
from dit_moe.training.curves_of_runs import CURVES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    add_config_arguments(parser, "digits")
    add_run_argument(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check what it needs, print config, sizes and costs, and stop",
    )
    parser.add_argument(
        "--profile",
        type=int,
        metavar="N",
        help="say where the time of N steps goes, and trace one; the run is as without",
    )
    add_cost_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Train, or with --dry-run only say what would be trained."""
    with no_downloads() if args.dry_run else nullcontext():
        experiment = load(args.config, args.overrides)
    args.folder = run_folder(args.config, args.folder, args.overrides)
    if args.dry_run:
        print(describe(dry_run(experiment, args.folder), args.gpu, args.gpus, args.mfu))
        return
    experiment, dataset = prepare(experiment)
    train(experiment, dataset, args.folder, args.profile)
    folder, scored_by = args.folder, task_of(experiment).scored_by
    end([folder, folder / CURVES], ("sample", folder), *scoring(scored_by, config.dump(experiment), folder))
