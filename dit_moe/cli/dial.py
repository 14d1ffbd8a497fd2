"""Quality against compute of one checkpoint, whose tokens are made to use fewer or more experts than in training.

Routers with a threshold get one that is solved for each target, top-k routers another k; the run is measured as it was
trained, too. Of every point are measured the active experts, the FLOPs that they make, the held-out loss at fixed noise
and times, and the Fréchet distance of samples; of a language model, held-out bits per byte. Changes, key=value, are to
the section `sample`, and for language models to `eval`, too.

Writes dial.json, dial.md and dial.png. The same command goes on where it stopped, and measures anew what another
checkpoint, or other settings, would give. dial.json keeps all points that were ever measured, the others show those
that were asked for.

    dit-moe dial runs/digits
    dit-moe dial runs/digits runs/digits_topk --targets 1,2,3,4 --out dial sampler.steps=10
    dit-moe dial runs/imagenet256/DiT-B-2-8E2A --no-metric --images 2000 --draws 2
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dit_moe.cli import split_words
from dit_moe.cli.ending import end
from dit_moe.studies.compute_budget import measure_compute_budgets, place_of
from dit_moe.studies.compute_budget_runs import HIGHEST, LOWEST, POINTS, ImageOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument("words", nargs="+", metavar="RUN", help="run folders, or checkpoint folders; key=value")
    parser.add_argument(
        "--targets",
        metavar="A,B",
        help=f"mean active experts; default: {POINTS} from {LOWEST:g} to {HIGHEST:g} times that of training; of top-k, "
        "the whole numbers among them",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go; default: dial in the first RUN")
    parser.add_argument("--no-metric", action="store_true", help="sample no images: the held-out loss alone")
    parser.add_argument("--seeds", type=int, metavar="N", help="sampling seeds; default: the run's eval.seeds")
    parser.add_argument("--images", type=int, metavar="N", help="held-out images, evenly spaced; default: all")
    parser.add_argument("--draws", type=int, metavar="N", help="of noise and time for each held-out image; default: 8")
    parser.add_argument(
        "--extractor", metavar="NAME", help="feature space, as of dit-moe eval; default: that of the first run's config"
    )


def run(args: argparse.Namespace) -> None:
    """Measure what is missing, write, and print the table. ValueError for bad input, before the work starts."""
    names, changes = split_words(args.words)
    folders = list({os.path.realpath(name): Path(name) for name in names}.values())
    targets = None if args.targets is None else _numbers(args.targets)
    numbers = {"seeds": args.seeds, "images": args.images, "draws": args.draws}
    options = ImageOptions(metric=not args.no_metric, extractor=args.extractor, **numbers)
    print(measure_compute_budgets(folders, changes, targets, options, args.out), end="")
    out = args.out or place_of(folders[0])
    sampled = [("sample", folders[0], f"target={target:g}") for target in (targets or [])[:1]]
    end([out / name for name in ("dial.png", "dial.md", "dial.json")], *sampled)


def _numbers(text: str) -> list[float]:
    try:
        return sorted({float(each) for each in text.split(",")})
    except ValueError:
        raise ValueError(f"--targets {text} must be numbers with commas between them: 1,1.5,2") from None
