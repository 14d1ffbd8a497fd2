"""What is shown of a study's results: means, spreads and paired differences over seeds, variant by variant."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from dit_moe.studies.results import RunResults, StudyResults, VariantResults

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
