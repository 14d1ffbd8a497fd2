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

from dit_moe.files import write_atomically
from dit_moe.studies.plan import PlannedRun
from dit_moe.studies.score import provenance
from dit_moe.tasks.train import build_trainer, prepare
from dit_moe.training.devices import build_accelerator

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


def was_measured_here(timing: dict[str, Any], runs: Sequence[PlannedRun]) -> bool:
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
    """Seconds that a `TrainingStep` takes by the variant's name, the median of `ROUNDS` times `steps`.

    Reading and encoding are not in it. One of `runs` for each variant, trained: routers are then as they become.
    """
    seconds: dict[str, list[float]] = {run.variant.name: [] for run in runs}
    for _ in range(ROUNDS):
        for run in runs:
            seconds[run.variant.name] += _time(run, steps)
    return {name: statistics.median(found) for name, found in seconds.items()}


def _time(run: PlannedRun, steps: int) -> list[float]:
    experiment, dataset = prepare(run.experiment)
    trainer = build_trainer(experiment, dataset, run.folder)
    trainer.open_run()
    trainer.prefetcher.start(trainer.step, trainer.step + 1)
    trainer.prefetcher.check()
    seconds = []
    for i in range(WARM_UP + steps):
        start = time.perf_counter()
        trainer.training_step(trainer.step + i, trainer.prefetcher.ready)  # always the same batch
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    trainer.prefetcher.close()
    return seconds
