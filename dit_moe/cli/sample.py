"""Sample from a run. Of images: images.npz, grid.png and sample.json in the output folder.

Overrides change the run's section `sample`; first_stage.model=FOLDER names its autoencoder. Several processes
(torchrun, accelerate) share the work, and the images are the same whatever their number. They are written as they come:
a set of any size takes the memory of one batch.

    dit-moe sample runs/digits count=1000 seed=1 guidance.scale=2 sampler=euler sampler.steps=50 --out guided
    dit-moe sample runs/digits count=1000 --save png,grid --out pictures
    dit-moe sample runs/imagenet256/DiT-XL-2 --recipe dit-cfg1.5 --save npz --out published

A language model's run writes text: it is printed, and kept with all settings in sample.json.

    dit-moe sample runs/lm_tiny --prompt "The with statement" temperature=0.5 max_new_tokens=300
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from dit_moe.cli import add_opened_run
from dit_moe.cli.ending import end, images_of, scoring
from dit_moe.config import Tree
from dit_moe.data import DATASETS
from dit_moe.extractors import EXTRACTORS
from dit_moe.formats import home_of
from dit_moe.registry import Registry
from dit_moe.sampling.labels import WORDS
from dit_moe.sampling.outputs import DEFAULT, OUTPUTS, SAMPLE_JSON
from dit_moe.sampling.recipes import SAMPLING
from dit_moe.tasks import SampleOptions, task_of

FEW = 50  # images of listed classes: they were sampled to be looked at
RECIPES = "; ".join(f"{recipe.name}, {recipe.summary}" for recipe in SAMPLING.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    add_opened_run(parser)
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
    task = task_of(args.run_folder)
    facts = task.sample(args.run_folder, args.overrides, options)
    if facts is not None:  # on the main process
        out = args.out or home_of(args.run_folder)
        files = [out / name for name in (*facts.get("files", ()), SAMPLE_JSON)]
        following = scoring(task.scored_by, facts["experiment"], args.run_folder)
        if following and task.kind == "images":
            following = _to_go_on(facts["experiment"], args.run_folder, files)
        end(files, *following)


def _to_go_on(experiment: Tree, run: Path, files: Sequence[Path]) -> list[tuple[object, ...]]:
    """The command that compares what was sampled with the images that were trained on, or else the run itself.

    Nothing where a few images were looked at.
    """
    samples = next((path for path in files if path.name in (OUTPUTS["npz"][0], OUTPUTS["png"][0])), None)
    settings, sample, images = experiment["eval"], experiment["sample"], images_of(experiment)
    if sample["count"] < FEW and sample["labels"] not in WORDS:
        return []
    reference = settings.get("reference") or _named(DATASETS, images)
    extractor = settings.get("extractor")
    feature_space = _named(EXTRACTORS, extractor) if extractor else ""
    named = extractor or images["name"] == "digits"
    if samples is None or not named or "{" in reference + feature_space:
        return [("eval", run)]
    return [("eval", samples, reference, *(("--extractor", feature_space) if feature_space else ()))]


def _named(registry: Registry, section: Tree) -> str:
    """How the command line names what a section chooses: its name, with those options that are not the defaults."""
    defaults = {field.name: field.default for field in fields(registry.config_class(section["name"]))}
    defaults["fingerprint"] = section.get("fingerprint")  # of what is there
    options = {key: value for key, value in section.items() if key != "name" and value != defaults.get(key)}
    return json.dumps({"name": section["name"], **options}) if options else str(section["name"])
