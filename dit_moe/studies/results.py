"""What a study has found so far: `results.json`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dit_moe import config
from dit_moe.moe import MoEConfig
from dit_moe.moe.routers import ROUTERS
from dit_moe.studies.plan import PlannedRun
from dit_moe.studies.score import read_score
from dit_moe.studies.study import Study
from dit_moe.tasks import task_of
from dit_moe.training.log import active_experts, read_log

POINTS = 200  # of a curve
WINDOW = 0.05  # of training: the steps that a standard deviation over steps is of …
LEAST = 20  # … and at least so many lines of the log


@dataclass(kw_only=True)
class RunResults:
    """What is known of a finished run."""

    seed: int
    folder: str
    step: int
    loss: float
    metric: float | None
    active: float | None  # experts per token, held-out; None of a dense model, as all about experts
    active_layers: list[float] | None
    training_active: dict[str, float] | None  # target, mean, std; None also without a log
    balance: float | None  # E·Σ f·P in the last quarter of training, mean over layers; None as above
    memory: int | None  # bytes that the training used at most; None: not known
    flops: float
    made: dict[str, Any]  # `provenance`
    curves: dict[str, Any]


@dataclass(kw_only=True)
class VariantResults:
    """A variant and its finished runs."""

    name: str
    label: str
    baseline: str
    objective: str
    model: str
    experts: int | None
    target: float | None
    router: str | None
    controlled: bool
    seconds_per_step: float | None
    parameters: int
    active_parameters: float
    runs: list[RunResults]
    options_of: str | None = None  # the variant whose searched options it has


@dataclass(kw_only=True)
class StudyResults:
    """All that is known of a study by now; `dataclasses.asdict` of it is results.json."""

    study: str
    title: str
    finished: bool
    missing: list[tuple[str, int]]  # variants and seeds
    unit: str  # of data: image or token
    loss: dict[str, str]  # label, unit
    metric: dict[str, Any] | None  # name, label, better
    settings: dict[str, Any]
    steps: list[int]
    timing: dict[str, Any] | None  # made, steps
    variants: list[VariantResults]
    search: dict[str, Any] | None = None  # seed, steps, rounds, baseline, chosen changes by variant


def gather(
    study: Study,
    name: str,
    runs: Sequence[PlannedRun],
    timing: Mapping[str, Any] | None,
    chosen: Mapping[str, Sequence[str]] | None = None,
) -> StudyResults:
    """The scores and logs of all runs that are finished, those that are missing, and how it was all done.

    Args:
        name: of the study.
        timing: {"made": `provenance`, "steps", "seconds_per_step": by the variant's name}; None: not timed.
        chosen: the changes that the study's search chose for each variant.
    """
    scores = {run.name: read_score(study, run) for run in runs}
    missing = [(run.variant.name, run.seed) for run in runs if scores[run.name] is None]
    seconds = timing["seconds_per_step"] if timing else {}
    text = task_of(runs[0].experiment).kind == "text"
    metric = next((score["metric"] for score in scores.values() if score and score["metric"]), None)
    return StudyResults(
        study=name,
        title=study.title,
        finished=not missing,
        missing=missing,
        unit="token" if text else "image",
        loss={"label": "held-out loss", "unit": "nats/token" if text else ""},
        metric=None if metric is None else {key: metric[key] for key in ("name", "label", "better")},
        settings={"heldout": None if text else config.dump(study.heldout), "seeds": list(study.seeds)},
        steps=sorted({run.experiment.train.steps for run in runs}),
        timing=None if timing is None else {key: timing[key] for key in ("made", "steps")},
        search=None
        if chosen is None or study.search is None
        else config.dump(study.search) | {"baseline": study.baseline, "chosen": dict(chosen)},
        variants=[
            _variant(study, [run for run in runs if run.variant == variant], scores, seconds.get(variant.name))
            for variant in study.variants
        ],
    )


def _variant(
    study: Study, runs: Sequence[PlannedRun], scores: Mapping[str, Any], seconds_per_step: float | None
) -> VariantResults:
    variant, experiment = runs[0].variant, runs[0].experiment
    moe: MoEConfig | None = experiment.model.moe
    footprint = experiment.model.footprint()
    return VariantResults(
        name=variant.name,
        label=variant.label or variant.name,
        baseline=study.baseline_of(variant),
        options_of=variant.options_of,
        objective=task_of(experiment).objective_name(experiment),
        model=experiment.model.name,
        experts=None if moe is None else moe.experts,
        target=None if moe is None else moe.target,
        router=None if moe is None else ROUTERS.name_of(moe.router),
        controlled=moe is not None and moe.router.controlled,
        seconds_per_step=seconds_per_step,
        parameters=footprint.total_params,
        active_parameters=footprint.active_params,
        runs=[_run(run, scores[run.name], moe) for run in runs if scores[run.name] is not None],
    )


def _run(run: PlannedRun, score: Mapping[str, Any], moe: MoEConfig | None) -> RunResults:
    log = read_log(run.folder / "log.jsonl")
    metric = score["metric"]
    return RunResults(
        seed=run.seed,
        folder=str(run.folder),
        step=score["step"],
        loss=score["loss"],
        metric=None if metric is None else metric["value"],
        active=score["active"],
        active_layers=score["active_layers"],
        training_active=active_experts(log, moe),
        balance=_balance(log) if moe is not None else None,
        memory=score.get("memory"),
        flops=score["flops"],
        made=score["made"],
        curves=curves(log, moe is not None),
    )


def _balance(log: Sequence[Mapping[str, Any]]) -> float | None:
    lines = [line["layers"] for line in log if line["step"] > 0.75 * log[-1]["step"] and "layers" in line]
    # A layer of which no token uses an expert has none: NaN.
    last = [balance for layers in lines for balance in layers["balance"] if not math.isnan(balance)]
    return statistics.fmean(last) if last else None


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

    def std_of(values: Sequence[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 else 0.0

    active = means("active")
    around = min(max(LEAST, round(WINDOW * len(log))), len(log))
    first = [min(max(0, (piece.start + piece.stop - around) // 2), len(log) - around) for piece in pieces]
    return {
        "step": [log[piece[-1]]["step"] for piece in pieces],
        "loss": [statistics.fmean(log[i]["loss"] for i in piece) for piece in pieces],
        "active": active,
        "active_std": active and [std_of([line["active"] for line in log[i : i + around]]) for i in first],
        "p": means("p"),
    }
