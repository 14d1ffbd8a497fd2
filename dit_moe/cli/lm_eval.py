"""Evaluate a language model on the tasks of lm-evaluation-harness: a run, or a folder in the format of transformers.

The model goes through the harness's `hf` interface, in this process. Its data sets come from the Hugging Face hub. The
table goes to stdout, everything to a JSON file: by default lm_eval.json in the run folder, or in the exported one.

    # needs the Hugging Face Hub
    dit-moe lm-eval runs/lm/LM-1.3B-64E8A-dtopp --config lm/tasks
    dit-moe lm-eval exported/lm_tiny --tasks arc_easy,piqa --limit 100 --out arc.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from dit_moe.checkpoint import find, is_run, run_of
from dit_moe.cli.ending import end
from dit_moe.formatting import PlainConsole, rounded
from dit_moe.interop.harness import DEFAULT_CONFIG, RESULT, run_tasks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument(
        "model", type=Path, metavar="RUN_OR_FOLDER", help="a run folder, or a folder with config.json and weights"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the section `sample` of a run")
    parser.add_argument(
        "--tasks", metavar="NAMES", help="these tasks of the harness, by comma; default all of --config"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help=f"list of tasks and their options; default {DEFAULT_CONFIG}"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N questions of each task only")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="sequences at a time; default 16")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the result; default {RESULT} in the model's folder")


def run(args: argparse.Namespace) -> None:
    """Evaluate, write the result and print a table. ValueError for bad input, before the work starts."""
    for option in ("limit", "batch_size"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value} must be at least 1")
    print_table(
        run_tasks(
            args.model,
            args.overrides,
            tasks=args.tasks.split(",") if args.tasks else (),
            config_file=args.config,
            limit=args.limit,
            batch_size=args.batch_size,
            out=args.out,
        )
    )
    folder = run_of(find(args.model)) if is_run(args.model) else args.model
    end([args.out or folder / RESULT])


def print_table(report: dict[str, Any]) -> None:
    """The tasks and their mean, to stdout."""
    table = Table("task", "metric", "shots")
    for column in ("value", "±"):
        table.add_column(column, justify="right")
    for row in report["tasks"]:
        value = "none" if row["value"] is None else rounded(row["value"], 4, 2)
        error = "" if row["stderr"] is None else rounded(row["stderr"], 4, 2)
        shots = "" if row["shots"] is None else str(row["shots"])
        table.add_row(row["task"], row["metric"], shots, value, error)
    if report["mean"] is not None:
        table.add_section()
        table.add_row("mean", "", "", rounded(report["mean"], 4, 2), "")
    PlainConsole().print(table)
