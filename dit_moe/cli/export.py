"""Write a run without what only training needs, such as the optimizer's state, to keep or to hand on.

A model of images becomes a run folder that `sample`, `eval`, `routing` and `dit_moe.load` open as any other: config,
weights, class names, autoencoder and feature extractor; with `--to diffusers`, a pipeline of diffusers with a model
card (`--to diffusers-dit`: diffusers' own DiTPipeline, for dense models), and with `--to dit`, or another format of
docs/checkpoints.md, its weights under that suite's names. A language model becomes a folder that transformers and
lm-evaluation-harness open.

Overrides change the run's section `sample`: `weights=model` takes the raw weights in place of the EMA's, `target=3`
has the thresholds of dtopp routers solved for three active experts. `first_stage.model=FOLDER` and others of
that section say what its autoencoder is.

    dit-moe export runs/digits exported/digits
    dit-moe export runs/digits exported/pipeline --to diffusers --license apache-2.0
    dit-moe export runs/dit-xl exported/dit --to dit
    dit-moe export runs/lm_tiny exported/lm_tiny
    dit-moe export runs/olmoe exported/olmoe --olmoe
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dit_moe.cli import add_opened_run
from dit_moe.cli.ending import end
from dit_moe.config import ConfigError
from dit_moe.experiments.run import open_text_run
from dit_moe.formats import FORMATS, ImageFormat
from dit_moe.moe.compute_budget import store_in_weights
from dit_moe.tasks import task_of
from dit_moe.tasks.image_export import export_image_run, export_weights

PIPELINES = ("diffusers", "diffusers-dit")  # ours, and diffusers' own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    add_opened_run(parser)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder to make")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the section `sample`")
    formats = [name for name in FORMATS.names() if issubclass(FORMATS.config_class(name), ImageFormat)]
    kinds = dict.fromkeys(("run", *PIPELINES, *formats))
    parser.add_argument("--to", choices=kinds, default="run", help="what a model of images becomes; default run")
    parser.add_argument(
        "--license", metavar="NAME", help="of the weights, for the model card: apache-2.0, cc-by-4.0, …"
    )
    parser.add_argument(
        "--olmoe", action="store_true", help="as transformers' OlmoeForCausalLM; for top-k routers without drn only"
    )


def run(args: argparse.Namespace) -> None:
    """Export, and print a summary as JSON. ValueError for bad input, before anything is written."""
    if task_of(args.run_folder).kind == "text":
        _export_text(args)
        return
    if args.olmoe:
        raise ConfigError("--olmoe", f": {args.run_folder} makes images; leave it out")
    if args.to in PIPELINES:
        _export_pipeline(args)
        return
    if args.license is not None:
        made = "a run folder" if args.to == "run" else f"what --to {args.to} writes"
        raise ConfigError("--license", f": {made} has no model card; leave it out, or add --to diffusers")
    if args.to != "run":
        print(json.dumps(export_weights(args.run_folder, args.overrides, args.folder, args.to), indent=1))
        end([args.folder])
        return
    print(json.dumps(export_image_run(args.run_folder, args.overrides, args.folder), indent=1))
    end([args.folder], ("sample", args.folder))


def _export_pipeline(args: argparse.Namespace) -> None:
    from dit_moe.tasks.pipeline_export import export_pipeline  # imports diffusers, which takes seconds

    native = args.to != PIPELINES[0]
    facts = export_pipeline(args.run_folder, args.overrides, args.folder, args.license, native=native)
    print(json.dumps(facts, indent=1))
    end([args.folder])


def _export_text(args: argparse.Namespace) -> None:
    from dit_moe.interop.export import export_run

    for option in [name for name in ("to", "license") if getattr(args, name) not in (None, "run")]:
        raise ConfigError(
            f"--{option}", f": {args.run_folder} is a language model, and this is for images; leave it out"
        )
    opened = open_text_run(args.run_folder, args.overrides)
    store_in_weights(opened.model)
    facts = export_run(opened, args.folder, olmoe=args.olmoe)
    shown = {key: facts[key] for key in ("run", "step", "weights", "weights_sha256")}
    print(json.dumps({"folder": str(args.folder), **shown}, indent=1))
    end([args.folder], ("lm-eval", args.folder))
