"""What metrics require of samples and of a reference, checked before any features are made."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from torch import Tensor

from dit_moe.data.listing import are_numbers
from dit_moe.evaluation.features import FeatureFolder
from dit_moe.evaluation.sources.base import EvaluationInput
from dit_moe.evaluation.sources.npz import require_extractor
from dit_moe.extractors import FeatureExtractor
from dit_moe.metrics import METRICS, Metric, configs_of

FEW = 2048  # images: fewer than features of the Inception network
NEEDS = {  # attribute of a FeatureSet: what a metric needs, what a set without it is or has, and a remedy
    "features_ND": ("images", "holds statistics alone", "name the images themselves"),
    "moments": ("a mean and a covariance", "has none", "name images, or a file with mu and sigma"),
    "spatial_moments": (
        "spatial features",
        "has none (in a file of statistics they are mu_s and sigma_s)",
        "take --extractor inception, with which --save-stats makes such files, too",
    ),
    "spatial_NS": ("spatial features", "has none", "take --extractor inception"),
    "thumbnails_NP": ("pixels", "has none", "name the images themselves"),
    "logits_NK": ("class scores", "was seen by an extractor that gives none", "choose another --extractor"),
    "predictions_N": (
        "classes",
        "was seen by an extractor that knows none of its data's",
        "choose another --extractor",
    ),
    "labels_N": ("labels", "has none", "save them as `labels` beside arr_0"),
}


@dataclass(frozen=True, eq=False)
class InputSummary:
    """What is known of samples or a reference before their features are made."""

    name: str
    count: int | None
    known: frozenset[str]  # the attributes of a FeatureSet that it will have
    labels_N: Tensor | None = None
    image_shape: tuple[int, int, int] | None = None
    label_remedy: str | None = None
    class_names: tuple[str, ...] | None = None  # unless they are the labels themselves, 0, 1, …
    model_classes: tuple[str, ...] | None = None  # of the model that makes the images, likewise


def outline(given: EvaluationInput) -> InputSummary:
    """What is known whatever the extractor."""
    images, statistics = given.images, given.statistics
    if images is None:
        assert statistics is not None, "an input is features, images or statistics"
        return InputSummary(statistics.source, statistics.moments.n, frozenset())
    return InputSummary(
        images.name,
        len(images),
        frozenset(),
        images.labels_N,
        images.image_shape,
        images.label_remedy,
        _words(images.class_names),
        _words(getattr(images, "model_classes", None)),
    )


def _words(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Names of classes that say more than their numbers."""
    return None if names is None or are_numbers(names) else names


def summarize(given: EvaluationInput, extractor: FeatureExtractor, as_reference: bool = False) -> InputSummary:
    """ValueError if the extractor does not take its images, or if its features or statistics are of another one."""
    images, statistics = given.images, given.statistics
    if images is None:
        assert statistics is not None, "an input is features, images or statistics"
        require_extractor(statistics, extractor)
        spatial = set() if statistics.spatial_moments is None else {"spatial_moments"}
        return replace(outline(given), known=frozenset({"moments"} | spatial))
    if isinstance(images, FeatureFolder):
        images.require_extractor(extractor)
        known = set(images.known)
    else:
        try:
            extractor.check(images.image_shape)
        except ValueError as error:
            raise ValueError(f"{images.name}: {error}") from None
        known = {"features_ND", "thumbnails_NP"} | ({"spatial_NS"} if extractor.has_spatial else set())
        known |= set() if images.labels_N is None else {"labels_N"}
    known |= {"moments"} | ({"spatial_moments"} if "spatial_NS" in known else set())
    known |= {"logits_NK"} if extractor.has_logits else set()
    known |= set() if extractor.classes is None else {"predictions_N"}
    if as_reference and statistics is not None and statistics.spatial_moments is None:
        with suppress(ValueError):  # of another extractor: they are not used
            require_extractor(statistics, extractor)
            known -= {"spatial_NS", "spatial_moments"}  # FID and sFID are to be of one reference
    return replace(outline(given), known=frozenset(known))


def require_comparable(
    sides: Sequence[InputSummary], reference: InputSummary | None, few_for_fid: bool = False
) -> None:
    """ValueError for fewer than 2 images on a side, or another shape than the reference's.

    Args:
        few_for_fid: also for fewer images, on a side or in the reference, than a FID should be of.
    """
    for one in sides:
        if one.count is not None and one.count < 2:
            raise ValueError(f"{one.name} has {one.count} image; an evaluation needs at least 2")
    if reference is None:
        return
    for one in sides:
        if one.image_shape and reference.image_shape and one.image_shape != reference.image_shape:
            found, wanted = ("×".join(map(str, each.image_shape or ())) for each in (one, reference))
            problem = f"{one.name} has images of {found} (channels, height, width), the reference {reference.name}"
            raise ValueError(f"{problem} of {wanted}; make them equal, for instance by --size and --channels")
    counts = [one.count for one in [*sides, reference] if one.count is not None]
    if few_for_fid and counts and min(counts) < FEW:
        problem = f"FID of {min(counts)} images is mostly sampling error; published ones are of 50 000"
        raise ValueError(f"{problem}; take at least {FEW}, held-out images included, or say --allow-few")


def plan(
    metrics: Sequence[object] | None,
    extractor: FeatureExtractor,
    sides: Sequence[InputSummary],
    reference: InputSummary,
) -> tuple[list[object], list[str]]:
    """Configs of the metrics that can be computed, and why others of the default were left out.

    Args:
        metrics: configs that were asked for: ValueError where one cannot be computed; None takes those that suit the
            extractor.
        sides: samples, and what else is compared with the reference.
    """
    planned: list[object] = []
    left_out: list[str] = []
    counts = [one.count for one in sides if one.count is not None]
    for config in configs_of(extractor.metrics) if metrics is None else metrics:
        name, metric = METRICS.name_of(config), METRICS.build(config)
        try:
            require_known(name, metric, sides, reference)
            if counts:
                metric.check(min(counts), reference.count)
            if "labels_N" in metric.needs_of_samples:
                _require_classes(name, extractor, sides)
                _require_same_names(name, sides, reference)
            planned.append(config)
        except ValueError as error:
            if metrics is not None:
                raise
            left_out.append(f"left out: {error}")
    return planned, left_out


def require_known(name: str, metric: Metric, sides: Sequence[InputSummary], reference: InputSummary) -> None:
    """ValueError, with a remedy, for what the metric `name` needs and a side or the reference does not have."""
    wanted = [(side, metric.needs | metric.needs_of_samples) for side in sides]
    for side, attributes in [*wanted, (reference, metric.needs)]:
        for attribute in sorted(attributes - side.known):
            what, found, remedy = NEEDS[attribute]
            if attribute == "labels_N" and side.label_remedy is not None:
                remedy = side.label_remedy
            problem = f"{name} needs {what}, and {side.name} {found}"
            raise ValueError(f"{problem}; {remedy}, or leave {name} out of --metrics")


def _require_classes(name: str, extractor: FeatureExtractor, sides: Sequence[InputSummary]) -> None:
    """ValueError unless the labels can be the classes of the extractor.

    Names are to be the extractor's own, in its order: sorted, as folders are, other names of ten classes would pass for
    its ten. Where it does not say them, there is to be one for every class.
    """
    if (count := extractor.classes) is None:
        return
    for one in sides:
        most = -1 if one.labels_N is None else int(one.labels_N.max())
        names, known = one.class_names or one.model_classes, extractor.class_names
        remedy = f"leave {name} out of --metrics, or choose another --extractor"
        if most >= count:
            raise ValueError(f"{one.name} has the label {most}, and {extractor.name} knows {count} classes; {remedy}")
        if names and len(names) != count:
            found = (
                f"{one.name} has {len(names)} classes, {names[0]} first, and {extractor.name} knows {count}, by number"
            )
            raise ValueError(f"{found}; name the folders 0 to {count - 1}, {remedy}")
        if names and known and names != known:
            label = next(i for i in range(count) if names[i] != known[i])
            unlike = f"number {label}, which is {known[label]} to {extractor.name}"
            found = f"{one.name} has the class {names[label]}, {unlike}"
            raise ValueError(f"{found}; name the folders 0 to {count - 1}, {remedy}")


def _require_same_names(name: str, sides: Sequence[InputSummary], reference: InputSummary) -> None:
    """ValueError if a side has a class that the reference does not name, so that its number is not known."""
    known = reference.class_names or ()
    for one in sides:
        missing = sorted(set(one.class_names or ()) - set(known))
        if known and missing:
            found = f"{one.name} has the class {missing[0]}, which is none of the {len(known)} of {reference.name}"
            raise ValueError(f"{found}; rename its folder, or leave {name} out of --metrics")
