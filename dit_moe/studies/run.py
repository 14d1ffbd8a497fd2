"""One run of a study: train it, score it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dit_moe.distributed import join_processes, locked, on_all
from dit_moe.files import require_writable, write_atomically
from dit_moe.studies.plan import SCORE, PlannedRun, read_loss, read_score
from dit_moe.studies.score import check_scoring, score_loss, score_metric
from dit_moe.studies.study import Study
from dit_moe.tasks.train import prepare, train

T = TypeVar("T")

PATIENCE = 60  # seconds that a job of a study which was killed may take to save itself


def run_one(study: Study, run: PlannedRun) -> None:
    """Train to the end, or go on, and score; what is done already is left alone. All processes call it together."""
    wait_for(run.folder)
    if _of_main(lambda: read_score(study, run)) is not None:
        return
    check_scoring(study, run)
    if not _of_main(run.is_trained):
        experiment, dataset = prepare(run.experiment)
        train(experiment, dataset, run.folder)
    score = _of_main(lambda: read_loss(study, run))
    if score is None:
        score = score_loss(study, run)
        _keep(score, run)  # also if the metric, which takes longer, fails
    if study.metric is not None:
        _keep(score_metric(study, run, score), run)


def wait_for(folder: Path, seconds: int = PATIENCE) -> None:
    """Until no other command is in `folder`; ValueError if that takes too long."""
    require_writable(folder)
    for left in reversed(range(seconds)):  # the processes count alike
        try:
            with locked(folder):
                return
        except ValueError:
            if not left:
                raise
            time.sleep(1)


def _of_main(call: Callable[[], T]) -> T:
    """The main process's answer, so that all do the same next."""
    return on_all(call)[0]


def _keep(score: dict[str, Any], run: PlannedRun) -> None:
    if join_processes().is_main_process:
        write_atomically(run.folder / SCORE, json.dumps(score, indent=1, allow_nan=False) + "\n")
