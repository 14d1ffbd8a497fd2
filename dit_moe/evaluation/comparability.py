"""What decides `comparable_to_published`: whether published numbers may stand beside a result, and if not, why.

`conditions_of` gathers how a result came about, and `reasons_not_comparable` decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from dit_moe import config
from dit_moe.evaluation.recipes import ADM_50K, EvaluationRecipe
from dit_moe.evaluation.sources.base import EvaluationInput, ReadOptions
from dit_moe.formatting import spaced
from dit_moe.metrics import METRICS
from dit_moe.moe.compute_budget import ComputeBudgetConfig
from dit_moe.sampling.labels import WORDS

# ------------------------------------------------------------------------------------------------------------- reasons

TEMPLATES = {  # kind of a reason: what it says of one result, and of many results that differ in their numbers alone
    "count": ("{found} generated images instead of {wanted}", "another number of generated images than {wanted}"),
    "seeds": (
        "the mean over {found} sampling seeds, published numbers are of one",
        "the mean over several sampling seeds, published numbers are of one",
    ),
    "reference size": (
        "images of {found} pixels against a reference of {reference}",
        "images of another size than the reference's",
    ),
    "size": ("images of {found} pixels instead of {wanted}", "images of another size than {wanted}"),
    "reference count": (
        "the reference's statistics are of {found} images",
        "the reference's statistics are of too few images",
    ),
    "reference images": (
        "precision and recall against {found} reference images instead of {wanted}",
        "precision and recall against another number of reference images than {wanted}",
    ),
    "compute budget": (
        "sampled with {found} instead of as trained",
        "sampled with another number of active experts than as trained",
    ),
    "storage": (
        "the generated images are {found}, and those of the reference {reference}",
        "images stored or read otherwise than the reference's",
    ),
    "in the reference": (
        "{found} of {count} images of {name} are also in the reference",
        "images of the reference among the generated ones",
    ),
    "in other samples": ("{found} of {count} images of {name} are also in {other}", "seeds that share images"),
    "equal images": (
        "only {found} of {count} images of {name} differ from each other",
        "generated images that are equal to each other",
    ),
}


@dataclass(frozen=True)
class Reason:
    """Why published numbers may not stand beside a result."""

    text: str
    general: str  # without the result's own numbers, so that many results share it

    @classmethod
    def of(cls, kind: str, **values: object) -> Reason:
        """By a template and the values in it."""
        text, general = TEMPLATES[kind]
        return cls(text.format(**values), general.format(**values))

    @classmethod
    def plain(cls, text: str) -> Reason:
        """One without numbers."""
        return cls(text, text)

    @classmethod
    def read(cls, text: str) -> Reason:
        """The reason that a result keeps as `text`."""
        for kind, (template, _) in TEMPLATES.items():
            pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(template))
            if found := re.fullmatch(pattern, text):
                return cls.of(kind, **found.groupdict())
        return cls.plain(text)


UNKNOWN = Reason.plain("the result does not say whether it is comparable")


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
    stored: tuple[str, str] | None = None  # how images of both sides are, if that alone moves a distance between them
    identical: Sequence[Reason] = ()  # images that are in the reference, or equal to each other


STATISTICS_UNUSED = "the reference's statistics are of another network; its images were used in their place"
LABELS = {
    "balanced": "as many images of each class",
    "data": "labels as frequent as in the training data",
    "listed": "labels of listed classes",
}


def reasons_not_comparable(found: Conditions, recipe: EvaluationRecipe = ADM_50K) -> list[Reason]:
    """Every reason why a result may not be compared with published ones; none if it may."""
    return [
        *_of_the_images(found, recipe),
        *(Reason.plain(f"the images were altered: {each}") for each in found.altered),
        *(Reason.plain(f"computed otherwise than published numbers: {each}") for each in found.changed_metrics),
        *_of_the_reference(found, recipe),
        *_of_the_sampling(found),
        *([Reason.plain(STATISTICS_UNUSED)] if found.statistics_unused else []),
        *reasons_of_storage(found),
        *found.identical,
    ]


def reasons_of_storage(found: Conditions) -> list[Reason]:
    """Images that are stored or read otherwise than the reference's: compression alone moves a distance."""
    return [] if found.stored is None else [Reason.of("storage", found=found.stored[0], reference=found.stored[1])]


def _of_the_images(found: Conditions, recipe: EvaluationRecipe) -> Iterator[Reason]:
    if not found.is_fid:
        yield Reason.plain(f"the features are those of {found.extractor}, not of the verified Inception")
    if found.n_generated is None:
        yield Reason.plain("the number of generated images is not known")
    elif found.n_generated != recipe.count:
        yield Reason.of("count", found=spaced(found.n_generated), wanted=spaced(recipe.count))
    if found.seeds != 1:
        yield Reason.of("seeds", found=found.seeds)
    if found.image_shape is None:
        yield Reason.plain("the size of the generated images is not known")
        return
    channels, height, width = found.image_shape
    size, side = f"{height}×{width}", found.reference_side
    if height != width or height not in recipe.sides:
        yield Reason.of("size", found=size, wanted=" or ".join(f"{each}×{each}" for each in recipe.sides))
    if channels != 3:
        yield Reason.plain(f"images of {channels} channel{'s' * (channels != 1)} instead of 3")
    if height == width and side is not None and side != height:
        yield Reason.of("reference size", found=size, reference=f"{side}×{side}")


def _of_the_reference(found: Conditions, recipe: EvaluationRecipe) -> Iterator[Reason]:
    if not found.reference_statistics:
        yield Reason.plain("the reference's statistics were computed here, not published with it")
    if found.reference_count is not None and found.reference_count < recipe.reference_count:
        yield Reason.of("reference count", found=spaced(found.reference_count))
    if found.reference_side is None:
        yield Reason.plain("the reference holds no images that would tell its resolution")
    images, wanted = found.reference_images, recipe.reference_images
    if "precision_recall" in found.metrics and images not in (0, wanted):
        yield Reason.of("reference images", found=spaced(images), wanted=spaced(wanted))


def _of_the_sampling(found: Conditions) -> Iterator[Reason]:
    if found.labels in LABELS:
        yield Reason.plain(f"{LABELS[found.labels]}; published baselines draw the classes at random")
    if found.weights not in (None, "ema"):
        yield Reason.plain("sampled with the weights as they are, published baselines with their moving average (EMA)")
    if found.precision not in (None, "fp32"):
        yield Reason.plain(f"sampled in {found.precision} instead of fp32")
    if found.compute_budget is not None:
        yield Reason.of("compute budget", found=found.compute_budget)


# ------------------------------------------------------------------------------------------------------ its conditions


def conditions_of(
    samples: Sequence[EvaluationInput],
    reference: EvaluationInput,
    metrics: Sequence[object],
    *,
    options: ReadOptions,
    extractor: str = "inception",
    is_fid: bool = True,
    statistics_unused: bool = False,
    identical: Sequence[Reason] = (),
) -> Conditions:
    """How a comparison comes about: needs no features.

    Args:
        samples: one set for each sampling seed.
        metrics: their configs.
        extractor, is_fid: the feature space, and whether it is that of the verified Inception.
        statistics_unused: the reference's statistics are of another network than the extractor.
        identical: images that are in the reference, or equal to each other.
    """
    first, given, images, real = samples[0], reference.statistics, samples[0].images, reference.images
    facts: dict[str, Any] = {} if images is None else images.facts()
    count = first.statistics.moments.n if images is None and first.statistics else None
    return Conditions(
        extractor=extractor,
        is_fid=is_fid,
        metrics=[METRICS.name_of(each) for each in metrics],
        changed_metrics=[_described(each) for each in metrics if each != type(each)()],
        n_generated=count if images is None else len(images),
        seeds=len(samples),
        image_shape=None if images is None else images.image_shape,
        altered=_altered(options, facts, {} if real is None else real.facts()),
        reference_statistics=given is not None and given.extractor is None,  # those made here say by what
        statistics_unused=statistics_unused,
        reference_count=None if given is None else given.moments.n,
        reference_images=0 if real is None else len(real),
        reference_side=None if real is None else real.image_shape[-1],
        stored=None if images is None or real is None else _stored(facts, real.facts()),
        identical=identical,
        **_sampling_of(facts, None if images is None else images.labels_N),
    )


def _sampling_of(facts: dict[str, Any], labels_N: Tensor | None) -> dict[str, Any]:
    """The conditions that the section `sample` tells; where it is not known, the labels tell what they can."""
    facts = facts.get("sample", facts)  # of an npz that `sample` wrote, and of a run
    sample = facts.get("experiment", {}).get("sample")
    if not isinstance(sample, dict):
        return {"labels": _labels_of(labels_N)}
    labels = sample.get("labels")
    # Sections that were written by older versions do not have all of these settings.
    settings: config.Tree = {name: sample[name] for name in ("target", "p", "vary") if name in sample}
    return {
        "labels": labels if labels in WORDS else "listed",
        "weights": sample.get("weights"),
        "precision": sample.get("precision"),
        "compute_budget": config.build(ComputeBudgetConfig, settings).describe(),
    }


def _labels_of(labels_N: Tensor | None) -> Any:
    """How labels were chosen, as far as they tell: only what a uniform draw cannot be."""
    if labels_N is None:
        return None
    counts = labels_N.unique(return_counts=True)[1]
    if len(counts) == 1:
        return "listed"
    return "balanced" if int(counts.max() - counts.min()) <= 1 else None


CHANGES = ("resized_from", "converted")
LOSSY = {"JPEG", "WEBP", "AVIF", "MPO"}  # formats of files that may lose detail


def _stored(*sides: dict[str, Any]) -> tuple[str, str] | None:
    """How the images of both sides are stored and read; None unless they differ in loss, resizing or channels."""
    found = [facts.get("stored") or {} for facts in sides]
    keys = [(sorted(LOSSY & set(each.get("formats", ()))), *map(each.get, CHANGES)) for each in found]
    if keys[0] == keys[1]:
        return None
    first, second = (
        " and ".join(each.get("formats") or ["of no lossy format"])
        + (f", resized from {each['resized_from']}" if each.get("resized_from") else "")
        + (f", converted from {each['converted']}" if each.get("converted") else "")
        for each in found
    )
    return first, second


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
