"""May published numbers stand beside a result, and if not, why?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dit_moe import config
from dit_moe.evaluation.features import FeatureFolder
from dit_moe.evaluation.recipes import Conditions, not_comparable
from dit_moe.evaluation.sources.base import EvaluationInput, ReadOptions, Statistics
from dit_moe.metrics import METRICS, configs_of
from dit_moe.moe.compute_budget import ComputeBudgetConfig


def vouched(
    report: dict[str, Any],
    samples: Sequence[EvaluationInput],
    reference: EvaluationInput,
    options: ReadOptions,
    metrics: Sequence[object] | None,
    **how: Any,
) -> dict[str, Any]:
    """A report that also says whether published numbers may stand beside it, why not, and `how` it was asked for."""
    facts = report["provenance"]
    computed, space = facts["metrics"], facts["extractor"]
    configs = configs_of(computed) if metrics is None else metrics
    configs = [each for each in configs if METRICS.name_of(each) in computed]
    reasons = reasons_not_comparable(
        samples, reference, configs, options=options, extractor=space["name"], is_fid=space["is_fid"]
    )
    if reference.statistics is not None and not _used(reference.statistics, facts["reference"]):
        reasons.append("the reference's statistics are of another network; its images were used in their place")
    reasons += facts["identical"]
    comparable = {"comparable_to_published": not reasons, "not_comparable_because": reasons}
    return report | {"provenance": facts | how | comparable}


def _used(given: Statistics, described: dict[str, Any]) -> bool:
    """Whether a reference, as the report describes it, was these statistics, be it beside images or alone."""
    return given.sha256 in (described.get("sha256"), described.get("statistics", {}).get("sha256"))


def reasons_not_comparable(
    samples: Sequence[EvaluationInput],
    reference: EvaluationInput,
    metrics: Sequence[object],
    *,
    options: ReadOptions,
    extractor: str,
    is_fid: bool,
) -> list[str]:
    """Why published numbers may not stand beside the result; empty if they may. Needs no features."""
    first, given = samples[0], reference.statistics
    facts, labels_N = _told(first)
    sample = _sampled(facts)
    (count, shape), (reference_images, reference_shape) = _extent(first), _extent(reference)
    conditions = Conditions(
        extractor=extractor,
        is_fid=is_fid,
        metrics=[METRICS.name_of(each) for each in metrics],
        changed_metrics=[_described(each) for each in metrics if each != type(each)()],
        n_generated=first.statistics.moments.n if count is None and first.statistics else count,
        seeds=len(samples),
        image_shape=shape,
        altered=_altered(options, facts, _told(reference)[0]),
        reference_statistics=given is not None and given.extractor is None,  # those made here say by what
        reference_count=None if given is None else given.moments.n,
        reference_images=reference_images or 0,
        reference_side=None if reference_shape is None else reference_shape[-1],
        labels=_labels_of(labels_N) if sample is None else _plan_of(sample),
        weights=None if sample is None else sample.get("weights"),
        precision=None if sample is None else sample.get("precision"),
        dial=None if sample is None else _dial_of(sample),
    )
    return not_comparable(conditions)


def _extent(side: EvaluationInput) -> tuple[int | None, tuple[int, int, int] | None]:
    """Number and shape of its images, where it has any."""
    if side.features is not None:
        manifest = FeatureFolder.open(side.features).manifest
        return manifest.count, manifest.image_shape
    if side.source is None:
        return None, None
    return len(side.source), side.source.image_shape


def _told(side: EvaluationInput) -> tuple[dict[str, Any], Tensor | None]:
    """What a side says of itself, and its labels, be they read or kept with features."""
    if side.features is not None:
        stored = FeatureFolder.open(side.features)
        return stored.manifest.source | stored.manifest.facts, stored.labels()
    if side.source is None:
        return {}, None
    return side.source.facts(), side.source.labels_N


def _sampled(facts: dict[str, Any]) -> dict[str, Any] | None:
    """The section `sample` that images were made by, if that is known."""
    facts = facts.get("sample", facts)  # of an npz that `sample` wrote, and of a run
    found = facts.get("experiment", {}).get("sample")
    return found if isinstance(found, dict) else None


def _plan_of(sample: dict[str, Any]) -> Any:
    labels = sample.get("labels")
    return labels if isinstance(labels, str) else "listed"


def _dial_of(sample: dict[str, Any]) -> str | None:
    """Also of a section that was written before there was all that there is now."""
    stated: config.Tree = {name: sample[name] for name in ("target", "p", "vary") if name in sample}
    return config.build(ComputeBudgetConfig, stated).describe()


def _labels_of(labels_N: Tensor | None) -> Any:
    """What the labels themselves tell of how they were chosen: only what a uniform draw cannot be."""
    if labels_N is None:
        return None
    counts = labels_N.unique(return_counts=True)[1]
    if len(counts) == 1:
        return "listed"
    return "balanced" if int(counts.max() - counts.min()) <= 1 else None


def _altered(options: ReadOptions, *sides: dict[str, Any]) -> list[str]:
    changes = {
        f"resized to {options.size}": options.size is not None,
        f"converted to {options.channels} channels": options.channels is not None,
        f"mapped from {options.value_range}": options.value_range is not None,
        "resized or converted before their features were kept": any(
            facts.get(change) for facts in sides for change in ("converted", "size", "range")
        ),
    }
    return [change for change, done in changes.items() if done]


def _described(metric: Any) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in config.dump(metric).items())
    return f"{METRICS.name_of(metric)} with {settings}"
