"""How long a training step of each variant takes: one after the other in one process, with nothing beside it."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_moe import checkpoint
from dit_moe.data.batch_sampler import own_rows
from dit_moe.files import write_atomically
from dit_moe.models import MODELS
from dit_moe.moe import update_routers
from dit_moe.randomness import BatchRandom
from dit_moe.studies.plan import PlannedRun
from dit_moe.studies.score import provenance
from dit_moe.tasks import task_of
from dit_moe.tasks.train import prepare
from dit_moe.training.devices import build_accelerator
from dit_moe.training.ema import EMA
from dit_moe.training.loss import training_loss
from dit_moe.training.optimizer import build_optimizer

TIMING = "timing.json"
ROUNDS = 3  # through all variants: what slows the machine for a while slows all alike
WARM_UP = 2  # steps


def read_timing(out: Path, runs: Sequence[PlannedRun], steps: int) -> dict[str, Any] | None:
    """What `time_variants` wrote, wherever that was, if it is of these runs."""
    path = out / TIMING
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        return None  # it is made anew
    return found if all(found.get(key) == value for key, value in _identity(runs, steps).items()) else None


def is_of_here(timing: dict[str, Any], runs: Sequence[PlannedRun]) -> bool:
    """Whether this process, with this software and so many threads, made it."""
    return bool(timing["made"] == _made(runs))


def time_variants(out: Path, runs: Sequence[PlannedRun], steps: int) -> dict[str, Any]:
    """{"runs", "steps", "made", "seconds_per_step": by the variant's name}, kept in timing.json."""
    print(f"timing {len(runs)} variants", file=sys.stderr)
    timing = {
        **_identity(runs, steps),
        "made": _made(runs),
        "seconds_per_step": seconds_per_step(runs, steps),
    }
    write_atomically(out / TIMING, json.dumps(timing, indent=1) + "\n")
    return timing


def _identity(runs: Sequence[PlannedRun], steps: int) -> dict[str, Any]:
    timed = {
        run.name: {
            "weights_sha256": run.weights_sha256(),
            "micro_batch": run.experiment.train.micro_batch,
            "deterministic": run.experiment.train.deterministic,
        }
        for run in runs
    }
    return {"runs": timed, "steps": steps}


def _made(runs: Sequence[PlannedRun]) -> dict[str, Any]:
    return provenance(", ".join(sorted({_accelerator(run).mixed_precision.replace("no", "fp32") for run in runs})))


def _accelerator(run: PlannedRun) -> Any:
    return build_accelerator(run.experiment.train, run.folder)


def seconds_per_step(runs: Sequence[PlannedRun], steps: int) -> dict[str, float]:
    """Seconds a training step by the variant's name, the median of `ROUNDS` times `steps`.

    A step is what the trainer does with a batch once it is read and encoded: forward and backward of every micro-batch,
    clipping, optimizer, routers' controllers and the average. One of `runs` for each variant, trained: routers are then
    as they become.
    """
    seconds: dict[str, list[float]] = {run.variant.name: [] for run in runs}
    for _ in range(ROUNDS):
        for run in runs:
            seconds[run.variant.name] += _time(run, steps)
    return {name: statistics.median(found) for name, found in seconds.items()}


def _time(run: PlannedRun, steps: int) -> list[float]:
    experiment: Any
    experiment, dataset = prepare(run.experiment)
    opened = checkpoint.open_checkpoint(run.folder)
    parts = task_of(experiment).training_parts(experiment, dataset, run.folder, opened)
    model: nn.Module = MODELS.build(experiment.model)
    checkpoint.load_into(model, opened.weights("model"), opened.folder)
    config = experiment.train
    accelerator = _accelerator(run)
    device = accelerator.device
    model.to(device).train()
    ema = EMA(model, config.ema_decay)
    optimizer = build_optimizer(model, config)
    micro_batches = own_rows(config.batch_size, config.micro_batch)
    most = len(micro_batches[0])
    fetched = dataset.__getitems__([i % len(dataset) for i in range(most)])
    first = BatchRandom(0, "timing", total=config.batch_size, stop=most)
    batch = parts.prepare_batch({name: value.to(device) for name, value in fetched.items()}, first)
    weights: Any = model.aux_weights

    def step(i: int) -> None:
        for rows in micro_batches:  # the same rows, under draws of their own
            random = BatchRandom(0, "timing", i, total=config.batch_size, start=rows.start, stop=rows.stop)
            part = {name: value[: len(rows)] for name, value in batch.items()}
            with accelerator.autocast():
                total, _ = training_loss(model, parts.objective, part, random, weights)
            (total * (len(rows) / config.batch_size)).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        norm.item()  # the trainer, too, waits for the device here
        if config.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, norm)
        optimizer.step()
        optimizer.zero_grad()
        update_routers(model, report=False)
        ema.update(model, i)
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds = []
    for i in range(WARM_UP + steps):
        start = time.perf_counter()
        step(i)
        if i >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    return seconds
