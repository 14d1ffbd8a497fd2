"""Results of `dit-moe eval` in one table, beside published ones.

Rows that cannot be compared with the published ones are marked, and footnotes say why. Markdown on stdout.

    dit-moe table runs/digits runs/digits_topk --published none
    dit-moe table runs/*/metrics.json --out table.md --csv table.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from dit_moe.evaluation.published import BASELINES, Baseline
from dit_moe.evaluation.table import published_row, read_result, to_csv, to_markdown
from dit_moe.files import require_writable, write_atomically

PUBLISHED: dict[str, Callable[[Baseline], bool]] = {
    "all": lambda row: True,
    "256": lambda row: row.image_size == 256,
    "512": lambda row: row.image_size == 512,
    "none": lambda row: False,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument(
        "results",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="a result of dit-moe eval --out, or a folder that holds it as metrics.json",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the Markdown here too")
    parser.add_argument("--csv", type=Path, metavar="FILE.csv", help="write the unrounded numbers here")
    parser.add_argument(
        "--published", choices=list(PUBLISHED), default="all", help="which published rows follow; default %(default)s"
    )


def run(args: argparse.Namespace) -> None:
    """Print the table. ValueError for bad input, before anything is written."""
    rows = [read_result(path) for path in args.results]
    rows += [published_row(each) for each in BASELINES if PUBLISHED[args.published](each)]
    if not rows:
        raise ValueError("no rows; name at least one RUN, or leave out --published none")
    for option, path in (("--out", args.out), ("--csv", args.csv)):
        if path is not None and path.is_dir():
            raise ValueError(f"{option} {path} is a folder; name a file in it")
        if path is not None:
            require_writable(path.parent)
    markdown = to_markdown(rows)
    if args.out is not None:
        write_atomically(args.out, markdown)
    if args.csv is not None:
        write_atomically(args.csv, to_csv(rows))
    print(markdown, end="")
