"""Write a run without what only training needs, such as the optimizer's state, to keep or to hand on.

A model of images becomes a run folder that `sample`, `eval`, `routing` and `dit_moe.load` open as any other: config,
weights, class names, autoencoder and feature extractor. A language model becomes a folder that transformers and
lm-evaluation-harness open.

Overrides change the run's section `sample`: `weights=model` takes the raw weights in place of the EMA's, `target=3`
has the thresholds of dtopp routers solved for three active experts.

    dit-moe export runs/digits exported/digits
    dit-moe export runs/lm_tiny exported/lm_tiny
    dit-moe export runs/olmoe exported/olmoe --olmoe
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dit_moe.cli.ending import end
from dit_moe.config import ConfigError
from dit_moe.experiments.run import open_text_run
from dit_moe.moe.compute_budget import store_in_weights
from dit_moe.tasks import task_of
from dit_moe.tasks.image_export import export_image_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder, or one of its checkpoint folders")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder to make")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the section `sample`")
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
    print(json.dumps(export_image_run(args.run_folder, args.overrides, args.folder), indent=1))
    end([args.folder], ("sample", args.folder))


def _export_text(args: argparse.Namespace) -> None:
    from dit_moe.interop.export import export_run

    opened = open_text_run(args.run_folder, args.overrides)
    store_in_weights(opened.model)
    facts = export_run(opened, args.folder, olmoe=args.olmoe)
    shown = {key: facts[key] for key in ("run", "step", "weights", "weights_sha256")}
    print(json.dumps({"folder": str(args.folder), **shown}, indent=1))
    end([args.folder], ("lm-eval", args.folder))
