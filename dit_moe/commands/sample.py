"""Sample images from a run: images.npz, grid.png and sample.json in the output folder.

Overrides change the run's section `sample`. Under `accelerate launch` the processes share the work, and the images are
the same whatever their number.

    dit-moe sample runs/digits count=1000 seed=1 guidance.scale=2 sampler=euler sampler.steps=50 --out guided
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from dit_moe import config
from dit_moe.commands.evaluate import write_atomically
from dit_moe.generate import Generator, choose_labels
from dit_moe.metrics import write_images
from dit_moe.moe import measure_active
from dit_moe.pictures import save_grid
from dit_moe.processes import join_processes
from dit_moe.runs import Run, open_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder, or one of its checkpoint folders")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the section `sample`")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the results go; default the run folder")


def run(args: argparse.Namespace) -> None:
    """Sample and write the three files. ValueError for bad input, before anything is written."""
    out = args.out or args.run_folder
    sample(open_run(args.run_folder, args.overrides, device=join_processes().device), out)


def sample(opened: Run, out: Path) -> dict[str, Any] | None:
    """Sample by the run's section `sample` into the folder `out`.

    Returns what sample.json holds; None on all but the main process. Raises ValueError if `out` cannot be written.
    """
    state, settings = join_processes(), opened.experiment.sample
    labels_N = choose_labels(settings, opened.experiment.model.num_classes)
    require_folder(out)
    start = time.perf_counter()
    generator = opened.generator()
    with measure_active(opened.model) as active:
        images_NCHW = _share(generator, labels_N, out, state)
    if images_NCHW is None:
        return None
    facts = {
        "run": str(opened.folder),
        "step": opened.step,
        "model": opened.experiment.model.name,
        "objective": config.dump(opened.experiment)["objective"],
        "sample": config.dump(settings),
        "evaluations": generator.evaluations(),
        "active_experts": active(),
        "seconds": time.perf_counter() - start,
        "versions": {name: version(name) for name in ("dit_moe", "torch", "diffusers")},
    }
    write_images(out / "images.npz", images_NCHW.permute(0, 2, 3, 1).contiguous().numpy(), labels_N.numpy())
    save_grid(images_NCHW, labels_N, out / "grid.png")
    write_atomically(out / "sample.json", json.dumps(facts, indent=1) + "\n")
    return facts


def require_folder(out: Path) -> None:
    """Make the folder `out` if need be; ValueError if it cannot be made or written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".writable_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{out} cannot be written ({error.strerror}); choose another folder with --out") from None


def _share(generator: Generator, labels_N: Tensor, out: Path, state: PartialState) -> Tensor | None:
    """All images [N, C, H, W] on the main process, every process making those at its own strided indices."""
    rank, world = state.process_index, state.num_processes
    mine = range(rank, len(labels_N), world)
    made = list(_with_progress(generator, mine, labels_N, shown=state.is_main_process))
    own = torch.cat(made) if made else None
    if world == 1:
        return own
    part = out / ".parts" / f"{rank}.npy"
    part.parent.mkdir(exist_ok=True)
    if own is not None:
        np.save(part, own.numpy())
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    assert own is not None
    images = torch.empty(len(labels_N), *own.shape[1:], dtype=torch.uint8)
    for other in range(min(world, len(labels_N))):
        path = out / ".parts" / f"{other}.npy"
        images[other::world] = torch.from_numpy(np.load(path, allow_pickle=False))
        path.unlink()
    part.parent.rmdir()
    return images


def _with_progress(generator: Generator, indices: range, labels_N: Tensor, shown: bool) -> Iterator[Tensor]:
    columns = (TextColumn("sampling"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    shown = shown and console.is_terminal
    with Progress(*columns, console=console, disable=not shown, transient=True) as progress:
        batches = math.ceil(len(indices) / generator.config.batch_size)
        bar = progress.add_task("", total=batches * generator.sampler.steps)
        yield from generator.batches(indices, labels_N, on_step=lambda step, steps: progress.advance(bar))
