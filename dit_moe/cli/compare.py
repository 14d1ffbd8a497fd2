"""Compare routers: train the variants of a study with several seeds, score them alike, and put them side by side.

STUDY is a file, the name of a built-in study (configs/studies/), or the folder of one that was begun. Runs go into
runs/compare-<its name>/, one folder each, several side by side where the machine has the cores or the GPUs. Running the
same command again goes on where it stopped, and a study whose config was changed is not mixed with runs that were made
before. `key=value` changes the study (seeds=[0]) or all of its variants (train.steps=50).

    dit-moe compare digits
    dit-moe compare digits seeds=[0] train.steps=50 --out runs/try
    dit-moe compare lm-tiny --variants topk,dtopp --list
    dit-moe compare digits --report               # tables and pictures of what is there by now; starts nothing
    # needs ImageNet and Inception's weights
    dit-moe compare imagenet256-s --list          # the commands of all runs, for a cluster; then once without --list
    dit-moe compare imagenet256-s --only topk/0   # one of them; may be started by torchrun
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dit_moe.cli.ending import end
from dit_moe.config import ConfigError
from dit_moe.studies.compare import StudyFolder
from dit_moe.studies.jobs import end_with_parent
from dit_moe.training import TrainingError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument("study", metavar="STUDY", help="a YAML file, or the name of a built-in study: digits")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the study, or to all variants")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default runs/compare-<name of the study>")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time; default one for each GPU, or for each core"
    )
    parser.add_argument(
        "--variants", metavar="NAME,NAME", help="run only these now; others can follow, into the same folder"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="print the command of each run that is missing, and stop")
    instead.add_argument("--only", metavar="VARIANT/SEED", help="do this one run, and nothing else")
    instead.add_argument(
        "--report",
        action="store_true",
        help="write table and pictures of the runs that are there, also while others run",
    )


def run(args: argparse.Namespace) -> None:
    """Do what is missing and write results.json, table.md, table.csv and the pictures. ValueError for bad input."""
    end_with_parent()
    if args.variants is not None and (args.only is not None or args.report):
        option = "--report" if args.report else "--only"
        raise ConfigError("--variants", f" says what to run, and {option} does not ask; leave it out")
    wanted = [] if args.variants is None else [name.strip() for name in args.variants.split(",")]
    study = StudyFolder.open(args.study, args.overrides, args.out, wanted)
    if args.only is not None:
        study.run_only(args.only)
        end([study.out], ("compare", *study.words, "--report"))
    elif args.list:
        print("".join(f"{command}\n" for command in study.missing_commands()), end="")
    elif args.report:
        print(study.report(), end="")
        end(study.files())
    else:
        table, failed = study.run_missing(args.jobs)
        print(table, end="")
        runs = study.first_runs()
        end([study.out, *study.files()], *([("curves", *runs)] if runs else []))
        if failed:
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            last, where = failed[0].last_line(), failed[0].output
            raise TrainingError(f"{failed[0].name}{more} failed: {last}; all of it is in {where}")
