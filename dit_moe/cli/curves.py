"""Draw the curves of one run, or of several in one picture, also while they train.

Loss and held-out loss, distances to the data, active experts, the threshold p, learning rate, gradient norm and speed
over the steps. Training itself draws curves.png into its run folder every few minutes, and at its end.

    dit-moe curves runs/digits
    dit-moe curves runs/digits runs/topk --out both.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dit_moe.cli.ending import end
from dit_moe.files import require_output, write_atomically
from dit_moe.training.curves_of_runs import CURVES, curves_png


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.png", help="default: curves.png in the run folder; of several runs, here"
    )


def run(args: argparse.Namespace) -> None:
    """Draw. ValueError for a run that cannot be read, before anything is written."""
    runs = list(dict.fromkeys(args.runs))
    out = args.out or (runs[0] / CURVES if len(runs) == 1 else Path(CURVES))
    picture = curves_png(runs)
    require_output(out, "--out", ".png", "curves")
    write_atomically(out, picture)
    end([out])
