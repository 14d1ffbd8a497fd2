"""What decides `comparable_to_published`: whether published numbers may stand beside a result, and if not, why.

`conditions_of` gathers how a result came about, and `reasons_not_comparable` decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from dit_moe import config
from dit_moe.evaluation.recipes import ADM_50K, EvaluationRecipe
from dit_moe.evaluation.report import Reason
from dit_moe.evaluation.sources.base import EvaluationInput, ReadOptions
from dit_moe.metrics import METRICS
from dit_moe.moe.compute_budget import ComputeBudgetConfig

# ------------------------------------------------------------------------------------------------------------ decision


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """How a result came about, as far as it decides whether published numbers may stand beside it."""

    extractor: str
    is_fid: bool  # the extractor is the Inception whose weights were verified
    metrics: Sequence[str]
    changed_metrics: Sequence[str] = ()  # whose settings are not the defaults: "precision_recall with k=5"
    n_generated: int | None  # None: not known
    seeds: int
    image_shape: tuple[int, int, int] | None  # (C, H, W) of the generated images, as compared; None: not known
    altered: Sequence[str] = ()  # what was done to either side's images: "resized to 256"
    reference_statistics: bool  # the reference came with its own, rather than having them computed of its images
    statistics_unused: bool = False  # they are of another network, so that the reference's images were used instead
    reference_count: int | None  # images that its statistics say they are of; None: they do not say
    reference_images: int  # beside the statistics; 0: none
    reference_side: int | None  # of its images, in pixels; None: it has none
    labels: Literal["random", "balanced", "data", "listed"] | None = None  # None: not known, as the next two
    weights: str | None = None
    precision: str | None = None
    compute_budget: str | None = None  # "target=[1, 2] by layer", "p=0.95"; None: as trained, or not known
    identical: Sequence[str] = ()  # sets that are the same images


LABELS = {
    "balanced": "as many images of each class",
    "data": "labels as frequent as in the training data",
    "listed": "labels of listed classes",
}


def reasons_not_comparable(found: Conditions, recipe: EvaluationRecipe = ADM_50K) -> list[Reason]:
    """Every reason why a result may not be compared with published ones; none if it may."""
    reasons: list[Reason] = []
    if not found.is_fid:
        reasons.append(Reason.plain(f"the features are those of {found.extractor}, not of the verified Inception"))
    if found.n_generated is None:
        reasons.append(Reason.plain("the number of generated images is not known"))
    elif found.n_generated != recipe.count:
        reasons.append(Reason.of("count", found=_count(found.n_generated), wanted=_count(recipe.count)))
    if found.seeds != 1:
        reasons.append(Reason.of("seeds", found=found.seeds))
    reasons += _of_the_images(found, recipe)
    reasons += [Reason.plain(f"the images were altered: {each}") for each in found.altered]
    reasons += [Reason.plain(f"computed otherwise than published numbers: {each}") for each in found.changed_metrics]
    reasons += _of_the_reference(found, recipe)
    reasons += _of_the_sampling(found)
    if found.statistics_unused:
        reasons.append(
            Reason.plain("the reference's statistics are of another network; its images were used in their place")
        )
    return reasons + [Reason.plain(each) for each in found.identical]


def _of_the_images(found: Conditions, recipe: EvaluationRecipe) -> list[Reason]:
    if found.image_shape is None:
        return [Reason.plain("the size of the generated images is not known")]
    reasons = []
    channels, height, width = found.image_shape
    size = f"{height}×{width}"
    if height != width or height not in recipe.sides:
        reasons.append(Reason.of("size", found=size, wanted=" or ".join(f"{side}×{side}" for side in recipe.sides)))
    if channels != 3:
        reasons.append(Reason.plain(f"images of {channels} channel{'s' * (channels != 1)} instead of 3"))
    side = found.reference_side
    if height == width and side is not None and side != height:
        reasons.append(Reason.of("reference size", found=size, reference=f"{side}×{side}"))
    return reasons


def _of_the_reference(found: Conditions, recipe: EvaluationRecipe) -> list[Reason]:
    reasons = []
    if not found.reference_statistics:
        reasons.append(Reason.plain("the reference's statistics were computed here, not published with it"))
    if found.reference_count is not None and found.reference_count < recipe.reference_count:
        reasons.append(Reason.of("reference count", found=_count(found.reference_count)))
    if found.reference_side is None:
        reasons.append(Reason.plain("the reference holds no images that would tell its resolution"))
    images, wanted = found.reference_images, recipe.reference_images
    if "precision_recall" in found.metrics and images not in (0, wanted):
        reasons.append(Reason.of("reference images", found=_count(images), wanted=_count(wanted)))
    return reasons


def _of_the_sampling(found: Conditions) -> list[Reason]:
    reasons = []
    if found.labels in LABELS:
        reasons.append(Reason.plain(f"{LABELS[found.labels]}; published baselines draw the classes at random"))
    if found.weights not in (None, "ema"):
        reasons.append(
            Reason.plain("sampled with the weights as they are, published baselines with their moving average (EMA)")
        )
    if found.precision not in (None, "fp32"):
        reasons.append(Reason.plain(f"sampled in {found.precision} instead of fp32"))
    if found.compute_budget is not None:
        reasons.append(Reason.of("compute budget", found=found.compute_budget))
    return reasons


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")


# ---------------------------------------------------------------------------------------------------- its conditions


def conditions_of(
    samples: Sequence[EvaluationInput],
    reference: EvaluationInput,
    metrics: Sequence[object],
    *,
    options: ReadOptions,
    extractor: str = "inception",
    is_fid: bool = True,
    statistics_unused: bool = False,
    identical: Sequence[str] = (),
) -> Conditions:
    """How a comparison comes about: needs no features.

    Args:
        samples: one set for each sampling seed.
        metrics: their configs.
        extractor, is_fid: the feature space, and whether it is that of the verified Inception.
        statistics_unused: the reference's statistics are of another network than the extractor.
        identical: sets that are the same images, one sentence each.
    """
    first, given = samples[0], reference.statistics
    images, real = first.images, reference.images
    facts = {} if images is None else images.facts()
    sample = _sampling_of(facts)
    return Conditions(
        extractor=extractor,
        is_fid=is_fid,
        metrics=[METRICS.name_of(each) for each in metrics],
        changed_metrics=[_described(each) for each in metrics if each != type(each)()],
        n_generated=len(images) if images is not None else first.statistics.moments.n if first.statistics else None,
        seeds=len(samples),
        image_shape=None if images is None else images.image_shape,
        altered=_altered(options, facts, {} if real is None else real.facts()),
        reference_statistics=given is not None and given.extractor is None,  # those made here say by what
        statistics_unused=statistics_unused,
        reference_count=None if given is None else given.moments.n,
        reference_images=0 if real is None else len(real),
        reference_side=None if real is None else real.image_shape[-1],
        labels=_labels_of(None if images is None else images.labels_N) if sample is None else _label_plan(sample),
        weights=None if sample is None else sample.get("weights"),
        precision=None if sample is None else sample.get("precision"),
        compute_budget=None if sample is None else _compute_budget(sample),
        identical=identical,
    )


def _sampling_of(facts: dict[str, Any]) -> dict[str, Any] | None:
    """The section `sample` that images were made by, if that is known."""
    facts = facts.get("sample", facts)  # of an npz that `sample` wrote, and of a run
    found = facts.get("experiment", {}).get("sample")
    return found if isinstance(found, dict) else None


def _label_plan(sample: dict[str, Any]) -> Any:
    labels = sample.get("labels")
    return labels if isinstance(labels, str) else "listed"


def _compute_budget(sample: dict[str, Any]) -> str | None:
    """Also of a section that was written before it had all of these settings."""
    settings: config.Tree = {name: sample[name] for name in ("target", "p", "vary") if name in sample}
    return config.build(ComputeBudgetConfig, settings).describe()


def _labels_of(labels_N: Tensor | None) -> Any:
    """How labels were chosen, as far as they tell: only what a uniform draw cannot be."""
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
