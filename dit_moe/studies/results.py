"""What a study has found so far: `results.json`, and the means, spreads and paired differences that are shown of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_moe import config
from dit_moe.moe import MoEConfig
from dit_moe.moe.routers import ROUTERS
from dit_moe.studies.score import read_score
from dit_moe.studies.study import PlannedRun, Study
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
    search: dict[str, Any] | None = None  # seed, steps, chosen changes by variant


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
        search=None if chosen is None or study.search is None else config.dump(study.search) | {"chosen": dict(chosen)},
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
    last = [line["layers"]["balance"] for line in log if line["step"] > 0.75 * log[-1]["step"] and "layers" in line]
    return statistics.fmean(map(statistics.fmean, last)) if last else None


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


# ------------------------------------------------------------------------------------- means, spreads and differences

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) over seeds; no standard deviation of one."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Paired:
    """Mean of the differences to a baseline with the same seeds, and its interval; none of a single pair."""

    mean: float
    low: float | None
    high: float | None
    n: int
    baseline: float  # its mean with those seeds

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    @property
    def relative(self) -> float:
        """The difference as a share of the baseline."""
        return self.mean / self.baseline


def spread(values: Iterable[float | None]) -> Spread | None:
    """Of the values that are there; None if there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None, len(known))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Paired | None:
    """Values less the baseline's with the same seed, with Student's interval for their mean; None without common seeds.

    Seeds decide the initial weights, the order of the data and all noise, so what two variants share cancels.
    """
    seeds = sorted(values.keys() & baseline.keys())
    differences = spread(values[seed] - baseline[seed] for seed in seeds)
    if differences is None:
        return None
    mean, std, n = differences.mean, differences.std, differences.n
    low = high = None
    if std is not None:
        from scipy.stats import t  # it takes long to import

        half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std / math.sqrt(n)
        low, high = mean - half, mean + half
    return Paired(mean, low, high, n, float(np.mean([baseline[seed] for seed in seeds])))


# ------------------------------------------------------------------------------------------------ variants of a study


@dataclass(frozen=True)
class VariantSummary:
    """A variant of a study with its numbers over seeds."""

    variant: VariantResults
    objective: str  # in brackets, where it is not the study's first; else empty
    baseline: VariantResults  # the variant that it is compared with, maybe itself
    loss: Spread | None
    difference: Paired | None  # of losses; None of a baseline
    metric: Spread | None
    active: Spread | None  # experts per token, held-out
    training: Spread | None  # … in the last quarter of training; std over steps and seeds
    flops: Spread | None
    balance: Spread | None
    memory: Spread | None  # bytes
    slowdown: float | None  # time of a step / the baseline's

    @property
    def label(self) -> str:
        return self.variant.label

    @property
    def label_of_all(self) -> str:
        """The label among variants of all objectives."""
        return " ".join(filter(None, [self.label, self.objective]))

    @property
    def runs(self) -> list[RunResults]:
        return self.variant.runs

    @property
    def seeds(self) -> list[int]:
        return sorted(run.seed for run in self.runs)

    @property
    def is_baseline(self) -> bool:
        return self.variant.name == self.baseline.name

    @property
    def off_target(self) -> float | None:
        """How far training's mean was from the target, as a share of it, with the seed that was furthest from it."""
        off = [run.training_active["mean"] / self.target - 1 for run in self.runs if run.training_active]
        return max(off, key=abs, default=None)

    @property
    def target(self) -> float:
        """Of a variant with experts."""
        assert self.variant.target is not None
        return float(self.variant.target)


def summaries(results: StudyResults) -> list[VariantSummary]:
    """All variants, in their order. ValueError for a baseline that is no variant."""
    variants = {variant.name: variant for variant in results.variants}
    first = next((variant.objective for variant in variants.values()), None)
    return [_summary(variant, variants, first) for variant in variants.values()]


def by_objective(results: StudyResults) -> dict[str, list[VariantSummary]]:
    """Objective → variants: only losses of one objective can be compared."""
    groups: dict[str, list[VariantSummary]] = {}
    for each in summaries(results):
        groups.setdefault(each.variant.objective, []).append(each)
    return groups


def _summary(variant: VariantResults, variants: Mapping[str, VariantResults], first: str | None) -> VariantSummary:
    if variant.baseline not in variants:
        raise ValueError(f"{variant.name}.baseline={variant.baseline} is no variant; these are {list(variants)}")
    baseline = variants[variant.baseline]
    losses, others = ({run.seed: run.loss for run in each.runs} for each in (variant, baseline))
    seconds, reference = variant.seconds_per_step, baseline.seconds_per_step
    runs = variant.runs
    return VariantSummary(
        variant=variant,
        objective="" if variant.objective == first else f"({variant.objective})",
        baseline=baseline,
        loss=spread(losses.values()),
        difference=None if variant is baseline else paired_difference(losses, others),
        metric=spread(run.metric for run in runs),
        active=spread(run.active for run in runs),
        training=_training([run.training_active for run in runs if run.training_active]),
        flops=spread(run.flops for run in runs),
        balance=spread(run.balance for run in runs),
        memory=spread(run.memory for run in runs),
        slowdown=seconds / reference if seconds and reference else None,
    )


def _training(runs: list[Mapping[str, float]]) -> Spread | None:
    means = spread(run["mean"] for run in runs)
    if means is None:
        return None
    within = float(np.mean([run["std"] ** 2 for run in runs]))
    return Spread(means.mean, math.sqrt(within + (means.std or 0.0) ** 2), means.n)  # law of total variance
