"""Show where the experts of a trained network go: count what its routers do on held-out data, draw it, tell it.

Of images: active experts by layer, noise level, class and patch, maps of single images, the load of the experts, which
of them work together, and which serve which classes and noise levels. Of a language model: by layer, position and kind
of token, and along a passage. From the run's log: thresholds, θ and active experts over training.

Overrides change the run's section `sample` (weights=model; target=3 or p=0.6 for another compute budget), a language
model's `eval`, and where the data are now, for instance data.path=FOLDER. If they are not there and nothing names
others, as of a run that was moved, samples that the run makes take their place, and the report says so.

In the output folder, by default RUN/routing: report.html (a single file), the pictures as PNGs, routing.json with the
numbers, and routing.npz with all of them.

    dit-moe routing runs/digits
    dit-moe routing runs/imagenet256/DiT-B-2-8E2A --images 5000 --times 50 batch_size=256 precision=bf16
    dit-moe routing runs/lm_tiny --tokens 50000
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from dit_moe.analysis.collect_images import IMAGES, TIMES
from dit_moe.analysis.collect_text import TOKENS
from dit_moe.analysis.report import report_routing
from dit_moe.analysis.statistics import RoutingStats
from dit_moe.cli import add_opened_run
from dit_moe.cli.ending import end
from dit_moe.formatting import PlainConsole, rounded
from dit_moe.tasks.own_samples import OWN_SAMPLES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    add_opened_run(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the section `sample`; see above")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the results go; default RUN/routing")
    parser.add_argument(
        "--split",
        metavar="NAME",
        help=f"of the data; default heldout, or train if there is no such one; {OWN_SAMPLES}: of the run itself",
    )
    parser.add_argument("--images", type=int, metavar="N", help=f"images, evenly spaced; default at most {IMAGES}")
    parser.add_argument("--times", type=int, metavar="N", help=f"noise levels of each image; default {TIMES}")
    parser.add_argument("--tokens", type=int, metavar="N", help=f"tokens of text; default at most {TOKENS:,}")


def run(args: argparse.Namespace) -> None:
    """Write the report, and print a summary to stderr."""
    counts = {"images": args.images, "times": args.times, "tokens": args.tokens}
    written = report_routing(args.run_folder, args.overrides, out=args.out, split=args.split, **counts)
    if written is not None:
        stats, page = written
        print_table(stats)
        on_data = not stats.facts["split"].startswith(OWN_SAMPLES)  # which `dial` needs
        places = [each for each in args.overrides if each.startswith("data.")]
        end([page], *([("dial", args.run_folder, *places)] if stats.adjustable and on_data else []))


def print_table(stats: RoutingStats, console: PlainConsole | None = None) -> None:
    """Active experts and balance of every layer, on stderr."""
    facts = stats.facts
    table = Table("MoE layer", title=f"{facts['model']}, step {facts['step']}, {facts['split']}", pad_edge=False)
    for name in ("active experts", "± over tokens", "balance of load"):
        table.add_column(name, justify="right")
    layers = zip(stats.layers_L, stats.active_L, stats.active_std_L, stats.balance_L, strict=True)
    for layer, active, std, balance in layers:
        table.add_row(str(layer), *(rounded(value, 4) for value in (active, std, balance)))
    table.add_row("all", f"{stats.active:.4f}", "", str(stats.target))
    (console or PlainConsole(stderr=True)).print(table)
