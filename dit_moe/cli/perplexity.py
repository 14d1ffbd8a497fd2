"""Score text by a language model: bits per byte, perplexity, and how many experts a token uses.

By default that is the held-out split of the run's data; or else files of UTF-8 text, each a document. Every document is
scored by itself, in windows as lm-evaluation-harness cuts them. `key=value` changes the sections `eval` and `sample`;
`data.heldout=FOLDER` names other held-out tokens, or where they have moved to.

The result is JSON on stdout and in a file, and a table on stderr. Started by torchrun or accelerate the command uses
every process; the result is the same.

    dit-moe perplexity runs/lm_tiny
    dit-moe perplexity runs/lm_tiny README.md docs/language.md --stride 64 --out readme.json precision=bf16
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from dit_moe.cli import add_opened_run, split_words
from dit_moe.cli.ending import end
from dit_moe.distributed import join_processes
from dit_moe.evaluation.text import RESULT, score_run
from dit_moe.formats import home_of
from dit_moe.formatting import PlainConsole, rounded

OPTIONS = ("stride", "batch_size", "max_documents")  # of the command that are keys of the section `eval`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    add_opened_run(parser)
    parser.add_argument("words", nargs="*", metavar="TEXT", help="files of UTF-8 text; or key=value; see above")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"where the result goes; default RUN/{RESULT}")
    parser.add_argument("--stride", metavar="N", help="tokens that each window predicts; fewer see more context")
    parser.add_argument("--batch-size", metavar="N", help="windows at a time")
    parser.add_argument("--max-documents", metavar="N", help="score the first so many only")


def run(args: argparse.Namespace) -> None:
    """Score; print JSON to stdout and a table to stderr."""
    files, changes = split_words(args.words)
    changes += [f"{name}={value or repr('')}" for name in OPTIONS if (value := getattr(args, name)) is not None]
    report = score_run(args.run_folder, changes, [Path(file) for file in files], args.out)
    if join_processes().is_main_process:
        print(json.dumps(report, indent=1, allow_nan=False))
        print_table(report)
        end([args.out or home_of(args.run_folder) / RESULT], ("routing", args.run_folder))


def print_table(report: dict[str, Any], console: PlainConsole | None = None) -> None:
    """The numbers of a report, on stderr."""
    counts = f"{report['documents']:,} documents, {report['tokens']:,} tokens, {report['bytes']:,} bytes"
    table = Table("", title=counts, pad_edge=False)
    table.add_column(f"step {report['step']}", justify="right")
    table.add_column("± standard error", justify="right")
    for name, label in (("bits_per_byte", "bits per byte"), ("perplexity", "perplexity per token"), ("loss", "loss")):
        numbers = report[name], report[f"{name}_std_error"]
        table.add_row(label, *("" if number is None else rounded(number, 4, 2) for number in numbers))
    if report["active_experts"] is not None:
        table.add_row("active experts", f"{report['active_experts']:.4f}", _target(report["target_experts"]))
    if reasons := report.get("not_comparable_because"):
        table.caption = f"bits per byte not comparable between tokenizers: {'; '.join(reasons)}"
    (console or PlainConsole(stderr=True)).print(table)


def _target(experts: float | Sequence[float] | None) -> str:
    if experts is None:
        return ""
    return (
        f"target {experts:g}" if isinstance(experts, float) else f"targets {', '.join(f'{one:g}' for one in experts)}"
    )
