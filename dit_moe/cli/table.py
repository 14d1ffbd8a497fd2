"""Results of `dit-moe eval` in one table, beside published ones.

Rows that cannot be compared with the published ones are marked, and footnotes say why. Markdown on stdout. Without a
RUN, the published rows alone.

    dit-moe table runs/digits runs/digits_topk --published none
    dit-moe table runs/digits*/metrics.json --out table.md --csv table.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from dit_moe.evaluation.published import BASELINES, Baseline
from dit_moe.evaluation.results import published_row, read_result, result_file
from dit_moe.evaluation.table import to_csv, to_markdown
from dit_moe.files import require_writable, write_atomically
from dit_moe.locks import exclusive

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
    for option, path, suffix in (("--out", args.out, ".md"), ("--csv", args.csv, ".csv")):
        if path is not None:
            _require_place(path, option, suffix, args.results)
    rows = [read_result(path) for path in args.results]
    rows += [published_row(each) for each in BASELINES if PUBLISHED[args.published](each)]
    if not rows:
        raise ValueError("no rows; name at least one RUN, or leave out --published none")
    if None not in (args.out, args.csv) and args.out.resolve() == args.csv.resolve():
        raise ValueError(f"--out {args.out} and --csv {args.csv} are one file; name two")
    markdown = to_markdown(rows)
    files = {path: text for path, text in ((args.out, markdown), (args.csv, to_csv(rows))) if path is not None}
    with ExitStack() as held:  # so that the two are of one call
        for path in files:
            held.enter_context(exclusive(path.parent, path.name))
        for path, text in files.items():
            write_atomically(path, text)
    print(markdown, end="")


def _require_place(path: Path, option: str, suffix: str, results: Sequence[Path]) -> None:
    example = path / f"table{suffix}" if path.is_dir() else path.with_suffix(suffix) if path.name else f"table{suffix}"
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder; name a file, for instance {example}")
    if path.suffix != suffix:
        raise ValueError(f"{option} {path} does not end in {suffix}; name a file that does, for instance {example}")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: the folder {path.parent} does not exist; make it first")
    for result in results:
        if path.resolve() == result_file(result).resolve():
            raise ValueError(f"{option} {path} would overwrite the RUN {result}; name another file")
    require_writable(path.parent)
