"""Sample from a run. Of images: images.npz, grid.png and sample.json in the output folder.

Overrides change the run's section `sample`. Several processes (torchrun, accelerate) share the work, and the images are
the same whatever their number. They are written as they come: a set of any size takes the memory of one batch.

    dit-moe sample runs/digits count=1000 seed=1 guidance.scale=2 sampler=euler sampler.steps=50 --out guided
    dit-moe sample runs/digits count=1000 --save png,grid --out pictures
    dit-moe sample runs/imagenet256/DiT-XL-2 --recipe dit-cfg1.5 --save npz --out published

A language model's run writes text: it is printed, and kept with all settings in sample.json.

    dit-moe sample runs/lm_tiny --prompt "The with statement" temperature=0.5 max_new_tokens=300
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dit_moe.evaluation.recipes import SAMPLING
from dit_moe.sampling.outputs import DEFAULT
from dit_moe.tasks import SampleOptions, task_of

RECIPES = "; ".join(f"{recipe.name}, {recipe.summary}" for recipe in SAMPLING.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder, or one of its checkpoint folders")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the section `sample`")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the results go; default the run folder")
    parser.add_argument(
        "--save",
        metavar="KINDS",
        help="what to write: npz (images.npz), png (a folder of single images), grid (grid.png); "
        f"default {','.join(DEFAULT)}",
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help=f"sample as a published baseline was, before any key=value: {RECIPES}",
    )
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="what a language model goes on from; may be given repeatedly"
    )


def run(args: argparse.Namespace) -> None:
    """Sample and write. ValueError for bad input, before anything is written."""
    options = SampleOptions(out=args.out, save=args.save, recipe=args.recipe, prompts=args.prompt)
    task_of(args.run_folder).sample(args.run_folder, args.overrides, options)
