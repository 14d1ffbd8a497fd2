"""The lines below a resolved config that say what it will cost."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from dit_moe import config
from dit_moe.config import ConfigError
from dit_moe.costs.gpus import GPUS, MFU, peak, precision_on
from dit_moe.costs.images import image_work
from dit_moe.costs.memory import memory_lines
from dit_moe.costs.text import text_work
from dit_moe.costs.time import duration, training_flops
from dit_moe.experiments.image import Experiment
from dit_moe.experiments.text import TextExperiment
from dit_moe.registry import did_you_mean
from dit_moe.rounding import speed


def add_cost_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what `describe` reckons with."""
    known = f"what --dry-run reckons with: {', '.join(GPUS)}; default %(default)s"
    parser.add_argument("--gpu", default="H100", metavar="NAME", help=known)
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="how many of them; default %(default)s")
    share = f"share of their peak FLOP/s that a step reaches, recompute counted; default {MFU}, an assumption"
    parser.add_argument("--mfu", type=float, metavar="SHARE", help=share)


def describe(
    experiment: Experiment | TextExperiment, gpu: str = "H100", gpus: int = 1, mfu: float | None = None
) -> str:
    """The resolved config and, as YAML comments below it, what it will cost on `gpus` GPUs of one kind.

    Args:
        experiment: resolved.
        gpu: a name of `GPUS`.
        mfu: share of the peak FLOP/s that is reached; None assumes `MFU`.

    Raises ConfigError for a GPU that is not in the table or cannot run the experiment, and for other impossible values.
    """
    if gpu not in GPUS:
        raise ConfigError("--gpu", f"={gpu} is not in the table; {did_you_mean(gpu, GPUS)}")
    for option, value, fits, wanted in (
        ("--gpus", gpus, gpus >= 1, "at least 1"),
        ("--mfu", mfu, mfu is None or 0 < mfu <= 1, "above 0 and at most 1"),
    ):
        if not fits:
            raise ConfigError(option, f"={value} must be {wanted}")
    return config.to_yaml(experiment) + "\n".join(f"# {line}" for line in _lines(experiment, gpu, gpus, mfu))


def _lines(experiment: Experiment | TextExperiment, gpu: str, gpus: int, mfu: float | None) -> Iterator[str]:
    footprint, train, sample = experiment.model.footprint(), experiment.train, experiment.sample
    work = text_work(experiment) if isinstance(experiment, TextExperiment) else image_work(experiment)
    row, rows = training_flops(experiment), train.steps * train.batch_size
    count = f"{rows:,} {work.rows}"
    if work.unit.per_row > 1:
        count += f", {rows * work.unit.per_row:,} {work.unit.name}"
    yield f"parameters        {footprint.total_params:,} in all, {footprint.active_params:,.0f} active per token"
    yield from work.flops
    yield f"training          {train.steps:,} steps, {count}, {row * rows:.4g} FLOPs"
    yield from memory_lines(experiment, gpu, gpus, work.rows)
    precision, share = precision_on(gpu, train.mixed_precision), MFU if mfu is None else mfu
    source = "an assumption, state another with --mfu" if mfu is None else "as stated"
    rows_per_s = gpus * peak(gpu, precision) * share / row
    units_per_s = speed(rows_per_s * work.unit.per_row)
    where = f"{gpus} × {gpu} at {share:.0%} of {peak(gpu, precision) / 1e12:g} TFLOP/s in {precision} ({source})"
    yield f"time              {duration(rows / rows_per_s)}, {units_per_s} {work.unit.name}/s on {where}"
    if work.generated:
        seconds = work.generation / (gpus * peak(gpu, sample.precision) * share)
        yield f"sampling          {duration(seconds)} for {work.generated} in {sample.precision}"
    yield from work.left_out
    moe = experiment.model.moe
    note = None if moe is None else moe.router.note(moe.target)
    if note is not None:
        yield f"note: {note}"
