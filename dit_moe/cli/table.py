"""Results of `dit-moe eval` in one table, beside published ones.

Rows that cannot be compared with the published ones are marked, and footnotes say why. Markdown on stdout. Without a
RUN, the published rows alone.

    dit-moe table runs/digits runs/digits_topk --published none
    dit-moe table runs/digits*/metrics.json --out table.md --csv table.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dit_moe.cli.ending import end
from dit_moe.evaluation.table import PUBLISHED, make_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument(
        "results",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="a result of dit-moe eval --out, or a folder that holds it as metrics.json; "
        "without any, the published rows alone are printed",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the Markdown here too")
    parser.add_argument("--csv", type=Path, metavar="FILE.csv", help="write the unrounded numbers here")
    parser.add_argument(
        "--published", choices=list(PUBLISHED), default="all", help="which published rows follow; default %(default)s"
    )


def run(args: argparse.Namespace) -> None:
    """Print the table. ValueError for bad input, before anything is written."""
    print(make_table(args.results, args.published, args.out, args.csv), end="")
    end(path for path in (args.out, args.csv) if path is not None)
