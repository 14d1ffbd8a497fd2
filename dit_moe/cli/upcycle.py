"""Start a model with experts from a trained one: from a dense model, or one with other experts.

Every expert gets hidden units of the trained feed-forwards, by one of three methods:

  split    each feed-forward is cut into experts: with all of them active, the model gives what its source gives
  cluster  the same, but the units of an expert are such as fire together, on the run's data
  copy     each expert is a whole feed-forward, with a little noise

Overrides change the run's config, also its data: classes keep their rows of the label table by name, others get fresh
ones, and position embeddings are interpolated to another size. What the model gives is compared with its source on
held-out data, and printed. The result is a run folder; train from it with train.init_from.

    dit-moe upcycle runs/digits_dense --name DiT-custom/2-8E2A --out runs/upcycled
    dit-moe train runs/upcycled/config.yaml train.init_from=runs/upcycled --run runs/digits_from_dense
    dit-moe upcycle runs/digits --name DiT-custom/2-16E4A --router topk --out runs/finer
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import get_args

from dit_moe.cli import add_opened_run
from dit_moe.cli.ending import end
from dit_moe.models.upcycling import Method
from dit_moe.tasks.upcycle import NOISE, UpcycleOptions, upcycle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    add_opened_run(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the run's config")
    parser.add_argument("--name", metavar="MODEL", help="the model to make, such as DiT-XL/2-64E8A; default: the run's")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="the run folder to make")
    parser.add_argument("--router", metavar="NAME", help="default: that of the run, or dtopp if it has no experts")
    parser.add_argument("--method", choices=get_args(Method), default="split", help="see above; default split")
    parser.add_argument(
        "--noise",
        type=float,
        metavar="X",
        help=f"added to the experts, in standard deviations of their weights; default {NOISE:g} for copies, else 0",
    )


def run(args: argparse.Namespace) -> None:
    """Upcycle, and print a summary as JSON. ValueError for bad input, before anything is written."""
    options = UpcycleOptions(name=args.name, router=args.router, method=args.method, noise=args.noise)
    print(json.dumps(upcycle(args.run_folder, options, args.overrides, args.out), indent=1))
    config = args.out / "config.yaml"
    end([args.out], ("train", config, f"train.init_from={args.out}", "--run", f"{args.out}-trained"))
