"""One run of a study: its training, and the scores that are kept in its folder."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from dit_moe.distributed import from_main, locked, on_main
from dit_moe.files import require_writable, write_atomically
from dit_moe.studies.plan import PlannedRun
from dit_moe.studies.score import SCORE, check_scoring, read_loss, read_score, score_loss, score_metric
from dit_moe.studies.study import Study
from dit_moe.tasks.train import prepare, train
from dit_moe.training.devices import peak_memory

PATIENCE = 60  # seconds that a job of a study which was killed may take to save itself


def train_and_score(study: Study, run: PlannedRun) -> None:
    """Train to the end, or go on, and score; what is done already is left alone. All processes call it together."""
    wait_for(run.folder)
    if from_main(lambda: read_score(study, run)) is not None:
        return
    check_scoring(study, run)
    trained_here = not from_main(run.is_trained)
    if trained_here:
        experiment, dataset = prepare(run.experiment)
        train(experiment, dataset, run.folder)
    score = from_main(lambda: read_loss(study, run))
    if score is None:
        memory = peak_memory() if trained_here else None  # before the scoring needs some, too
        score = score_loss(study, run) | {"memory": memory}
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


def _keep(score: dict[str, Any], run: PlannedRun) -> None:
    on_main(lambda: write_atomically(run.folder / SCORE, json.dumps(score, indent=1, allow_nan=False) + "\n"))
