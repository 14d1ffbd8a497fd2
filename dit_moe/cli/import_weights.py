"""Make a run folder of weights that another suite trained, which sample, eval, export and train.init_from read.

The format is recognised from the names and shapes of the tensors; docs/checkpoints.md lists the formats. Overrides
change the config of the run, and give what weights do not tell, such as the heads of an unnamed size.

    dit-moe import DiT-XL-2-256x256.pt --out runs/dit-xl
    dit-moe import checkpoint.pt --out runs/mine model.heads=6 first_stage.model=my/vae
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dit_moe.cli.ending import end
from dit_moe.formats import FORMATS
from dit_moe.formats.recognition import AUTO
from dit_moe.tasks.import_weights import import_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a file of weights, or a folder of such files")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config of the run")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run folder to make")
    formats = ", ".join(FORMATS.names())
    parser.add_argument("--format", default=AUTO, metavar="NAME", help=f"{formats}; default {AUTO}, the one that fits")
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="the averaged weights, the default, or the raw ones"
    )


def run(args: argparse.Namespace) -> None:
    """Import, and print a summary as JSON. ValueError for bad input, before anything is written."""
    facts = import_weights(args.source, args.out, args.format, args.overrides, args.weights)
    print(json.dumps(facts, indent=1))
    end([args.out], ("sample", args.out))
