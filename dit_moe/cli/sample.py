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
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dit_moe import checkpoint, config
from dit_moe.config import ConfigError
from dit_moe.distributed import join_processes, locked, on_main
from dit_moe.evaluation.recipes import SAMPLING, sampling_recipe
from dit_moe.experiments.image_run import Run, open_run
from dit_moe.experiments.text_run import is_text_run, open_text_run
from dit_moe.files import write_atomically
from dit_moe.sampling.generator import Generator
from dit_moe.sampling.outputs import FACTS, OUTPUTS, Take, open_outputs, parse_names, require_possible
from dit_moe.sampling.sharing import stream_together

RECIPES = "; ".join(f"{recipe.name}, {recipe.summary}" for recipe in SAMPLING.values())
DEFAULT = ("npz", "grid")  # of OUTPUTS


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
    if is_text_run(args.run_folder):
        _run_text(args)
        return
    if args.prompt is not None:
        raise ConfigError("--prompt", f": {args.run_folder} makes images; leave it out")
    save = DEFAULT if args.save is None else parse_names(args.save)
    overrides, recipe = args.overrides, None
    if args.recipe is not None:
        trained = checkpoint.open_checkpoint(args.run_folder).config()["objective"]["name"]
        chosen = sampling_recipe(args.recipe, trained)
        overrides, recipe = [*chosen.overrides, *overrides], chosen.label(overrides)
    opened = open_run(args.run_folder, overrides, device=join_processes().device)
    sample(opened, args.out or opened.folder.parent.parent, save, recipe)


def _run_text(args: argparse.Namespace) -> None:
    from dit_moe.cli.sample_text import sample_text  # and with it transformers

    for option in ("save", "recipe"):
        if getattr(args, option) is not None:
            raise ConfigError(f"--{option}", f": {args.run_folder} is a language model's run; leave it out")
    run = open_text_run(args.run_folder, args.overrides, device=join_processes().device)
    if args.prompt is not None:
        sample = replace(run.experiment.sample, prompts=tuple(args.prompt))
        run = replace(run, experiment=replace(run.experiment, sample=sample))
    sample_text(run, args.out or run.folder.parent.parent)


def sample(opened: Run, out: Path, save: Sequence[str] = DEFAULT, recipe: str | None = None) -> dict[str, Any] | None:
    """Sample by the run's section `sample` into the folder `out`, in the ways `save` names (see `outputs`).

    `recipe` is what the result calls its settings. Returns what sample.json holds, which is written last; None on all
    but the main process. Raises ValueError if `out` cannot be written, or another command writes there.
    """
    on_main(lambda: require_possible(out, save))
    with locked(out, FACTS, *(OUTPUTS[name][0] for name in save)):
        return _sample(opened, out, save, recipe)


def _sample(opened: Run, out: Path, save: Sequence[str], recipe: str | None) -> dict[str, Any] | None:
    labels_N = opened.labels()
    start = time.perf_counter()
    generator = opened.generator()
    takers: list[Take] = []  # one, on the main process
    with ExitStack() as stack, _progress(generator, len(labels_N)) as on_step:
        on_main(lambda: takers.append(stack.enter_context(open_outputs(out, save, labels_N))))
        active_experts = stream_together(generator, labels_N, lambda images: takers[0](images), on_step)
    if not join_processes().is_main_process:
        return None
    footprint = opened.experiment.model.footprint()
    facts = {
        "run": str(opened.folder),
        "step": opened.step,
        "weights_sha256": opened.sha256,
        "experiment": config.dump(opened.experiment),
        "recipe": recipe,
        "parameters": footprint.total_params,
        "active_parameters": footprint.active_params,
        "files": [OUTPUTS[name][0] for name in save],
        "evaluations": generator.evaluations(),
        "active_experts": active_experts,
        "thresholds": generator.thresholds,
        "device": str(generator.device),
        "processes": join_processes().num_processes,
        "seconds": time.perf_counter() - start,
        "versions": {name: version(name) for name in ("dit_moe", "torch", "diffusers")},
    }
    write_atomically(out / FACTS, json.dumps(facts, indent=1) + "\n")
    return facts


@contextmanager
def _progress(generator: Generator, count: int) -> Iterator[Callable[..., None]]:
    """A bar on the main process's terminal, for its own share; yields what to call after every step."""
    state, console = join_processes(), Console(stderr=True)
    columns = (TextColumn("sampling"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    shown = state.is_main_process and console.is_terminal
    with Progress(*columns, console=console, disable=not shown, transient=True) as progress:
        batches = math.ceil(count / state.num_processes / generator.config.batch_size)
        bar = progress.add_task("", total=batches * generator.sampler.steps)
        yield lambda step, steps: progress.advance(bar)
