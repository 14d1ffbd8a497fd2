"""What a study has found so far, as one JSON-ready dict: `results.json`, from which tables and pictures are made."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dit_moe import config
from dit_moe.moe import MoEConfig
from dit_moe.moe.routers import ROUTERS
from dit_moe.studies.plan import PlannedRun
from dit_moe.studies.score import read_score
from dit_moe.studies.study import Study
from dit_moe.tasks import task_of
from dit_moe.training.log import active_experts, read_log

Results = dict[str, Any]
POINTS = 200  # of a curve
WINDOW = 0.05  # of training: the steps that a standard deviation over steps is of …
LEAST = 20  # … and at least so many lines of the log


def gather(study: Study, name: str, runs: Sequence[PlannedRun], timing: Mapping[str, Any] | None) -> Results:
    """The scores and logs of all runs that are finished, those that are missing, and how it was all done.

    Args:
        name: of the study.
        timing: {"made": `provenance`, "steps", "seconds_per_step": by the variant's name}; None: not timed.
    """
    scores = {run.name: read_score(study, run) for run in runs}
    missing = [[run.variant.name, run.seed] for run in runs if scores[run.name] is None]
    seconds = timing["seconds_per_step"] if timing else {}
    text = task_of(runs[0].experiment).kind == "text"
    metric = next((score["metric"] for score in scores.values() if score and score["metric"]), None)
    return {
        "study": name,
        "title": study.title,
        "finished": not missing,
        "missing": missing,
        "unit": "token" if text else "image",
        "loss": {"label": "held-out loss", "unit": "nats/token" if text else ""},
        "metric": None if metric is None else {key: metric[key] for key in ("name", "label", "better")},
        "settings": {"heldout": None if text else config.dump(study.heldout), "seeds": list(study.seeds)},
        "steps": sorted({run.experiment.train.steps for run in runs}),
        "timing": timing and {key: timing[key] for key in ("made", "steps")},
        "variants": [
            _variant(study, [run for run in runs if run.variant is variant], scores, seconds.get(variant.name))
            for variant in study.variants
        ],
    }


def _variant(
    study: Study, runs: Sequence[PlannedRun], scores: Mapping[str, Any], seconds_per_step: float | None
) -> dict[str, Any]:
    variant, experiment = runs[0].variant, runs[0].experiment
    moe: MoEConfig | None = experiment.model.moe
    footprint = experiment.model.footprint()
    return {
        "name": variant.name,
        "label": variant.label or variant.name,
        "baseline": study.baseline_of(variant),
        "objective": task_of(experiment).objective_name(experiment),
        "model": experiment.model.name,
        "experts": moe and moe.experts,
        "target": moe and moe.target,
        "router": moe and ROUTERS.name_of(moe.router),
        "controlled": moe is not None and moe.router.controlled,
        "seconds_per_step": seconds_per_step,
        "parameters": footprint.total_params,
        "active_parameters": footprint.active_params,
        "runs": [_run(run, scores[run.name], moe) for run in runs if scores[run.name] is not None],
    }


def _run(run: PlannedRun, score: Mapping[str, Any], moe: MoEConfig | None) -> dict[str, Any]:
    log = read_log(run.folder / "log.jsonl")
    metric = score["metric"]
    return {
        "seed": run.seed,
        "folder": str(run.folder),
        "step": score["step"],
        "loss": score["loss"],
        "metric": None if metric is None else metric["value"],
        "active": score["active"],
        "active_layers": score["active_layers"],
        "training_active": active_experts(log, moe),
        "flops": score["flops"],
        "made": score["made"],
        "curves": curves(log, moe is not None),
    }


def curves(log: Sequence[Mapping[str, Any]], moe: bool) -> dict[str, Any]:
    """The log in at most `POINTS` pieces: means, and beside them the std of the active experts over the steps around.

    A log whose lines are means over steps of their own shows less than the std over steps.
    """
    width = max(1, math.ceil(len(log) / POINTS))
    pieces = [range(start, min(start + width, len(log))) for start in range(0, len(log), width)]

    def means(name: str) -> list[float] | None:
        if not moe or not log or any(line.get(name) is None for line in log):
            return None
        return [statistics.fmean(log[i][name] for i in piece) for piece in pieces]

    active = means("active")
    around = min(max(LEAST, round(WINDOW * len(log))), len(log))
    first = [min(max(0, (piece.start + piece.stop - around) // 2), len(log) - around) for piece in pieces]
    return {
        "step": [log[piece[-1]]["step"] for piece in pieces],
        "loss": [statistics.fmean(log[i]["loss"] for i in piece) for piece in pieces],
        "active": active,
        "active_std": active and [_std([line["active"] for line in log[i : i + around]]) for i in first],
        "p": means("p"),
    }


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
