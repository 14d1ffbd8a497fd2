"""Compare generated images with a reference: Fréchet distance, class accuracy, nearest neighbours.

Real held-out images stand beside every number. The result is JSON on stdout, and a table on stderr.

    dit-moe eval runs/digits
    dit-moe eval seed0.npz seed1.npz seed2.npz --reference digits --out metrics.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dit_moe.data import DATASETS
from dit_moe.evaluate import Reference, dataset_reference, evaluate, file_reference
from dit_moe.files import require_writable, write_atomically
from dit_moe.metrics import EXTRACTORS, read_images
from dit_moe.registry import did_you_mean


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument(
        "samples",
        nargs="+",
        type=Path,
        metavar="SAMPLES",
        help="images.npz (arr_0 uint8 NHWC, labels), or a folder that holds one; several are several sampling seeds",
    )
    parser.add_argument(
        "--reference",
        default="digits",
        metavar="NAME|FILE.npz",
        help=f"a dataset ({', '.join(DATASETS.names())}), which also gives the floor, or an npz of images",
    )
    parser.add_argument(
        "--extractor", default="digits_cnn64", metavar="NAME", help=f"feature space: {', '.join(EXTRACTORS.names())}"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result here too")


def run(args: argparse.Namespace) -> None:
    """Evaluate, print JSON to stdout and a table to stderr. ValueError for bad input, before anything is written."""
    if args.out is not None:
        _require_place(args.out)
    extractor = EXTRACTORS.build(EXTRACTORS.config_class(args.extractor)())
    samples = [read_images(path) for path in args.samples]
    report = evaluate(samples, _reference(args.reference), extractor)
    text = json.dumps(report, indent=1, allow_nan=False)
    if args.out is not None:
        write_atomically(args.out, text + "\n")
    print(text)
    print_table(report)


def _reference(name: str) -> Reference:
    if name in DATASETS.names():
        try:
            config = DATASETS.config_class(name)()
        except TypeError:  # it has to be told where its images are
            problem = f"--reference {name} does not say which images; sample or export them as an npz, and name that"
            raise ValueError(problem) from None
        return dataset_reference(config)
    if Path(name).exists() or name.endswith(".npz"):
        return file_reference(name)
    raise ValueError(f"--reference {name} is neither a file nor a dataset; {did_you_mean(name, DATASETS.names())}")


def _require_place(out: Path) -> None:
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file, for instance {out / 'metrics.json'}")
    require_writable(out.parent)


def print_table(report: dict[str, Any], console: Console | None = None) -> None:
    """The numbers of a report side by side, generated against held-out, on stderr."""
    facts = report["provenance"]
    name = f"fd_{facts['extractor']}"
    distance, neighbours = report[name], report["nearest_neighbour"]
    seeds = f"{distance['seeds']} × " if distance["seeds"] > 1 else ""
    table = Table(
        title=f"{seeds}{facts['n_gen']} images against {facts['n_ref']} of {facts['reference']}",
        caption="not comparable to published FIDs",
    )
    for column in ("", "generated", "± std", "held-out", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    floor = distance["floor"]
    table.add_row(name, *map(_show, (distance["generated"], distance["generated_std"], floor, distance["ratio"])))
    if distance["reconstruction"] is not None:
        shown = map(_show, (distance["reconstruction"], None, floor, distance["reconstruction_ratio"]))
        table.add_row("the same, of held-out images encoded and decoded", *shown)
    table.add_row("class accuracy", _show(report["class_accuracy"]), "", _show(report["class_accuracy_heldout"]), "")
    for space, medians in neighbours.items():
        table.add_row(f"nearest neighbour, {space}", _show(medians["generated"]), "", _show(medians["heldout"]), "")
    console = console or Console(stderr=True)
    console.print(table)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", style="yellow")


def _show(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
