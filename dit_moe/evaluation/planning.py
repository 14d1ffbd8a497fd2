"""What is known of samples and reference before their features are made, and which metrics can be computed of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dit_moe.evaluation.compute import unmet_need
from dit_moe.evaluation.features import FeatureFolder
from dit_moe.evaluation.sources.base import EvaluationInput, Statistics
from dit_moe.evaluation.sources.statistics import require_extractor
from dit_moe.extractors import FeatureExtractor
from dit_moe.metrics import METRICS, Metric, configs_of

FEW = 2048  # images: fewer than features of the Inception network


@dataclass(frozen=True, eq=False)
class InputSummary:
    """What is known of samples or a reference before their features are."""

    name: str
    count: int | None
    known: frozenset[str]  # the attributes of a FeatureSet that it will have
    labels_N: Tensor | None = None
    image_shape: tuple[int, int, int] | None = None
    label_remedy: str | None = None


def summarize(given: EvaluationInput, extractor: FeatureExtractor, as_reference: bool = False) -> InputSummary:
    """ValueError if the extractor does not take its images, or if its features or statistics are of another one."""
    of_features: set[str] = {"logits_NK"} if extractor.has_logits else set()
    of_features |= set() if extractor.classes is None else {"predictions_N"}
    source, statistics = given.source, given.statistics
    if given.features is not None:
        folder = FeatureFolder.open(given.features, extractor)
        spatial = {"spatial_moments"} if "spatial_NS" in folder.known else set()
        known = folder.known | of_features | spatial | {"moments"}
        manifest = folder.manifest
        return InputSummary(str(given.features), manifest.count, known, folder.labels(), manifest.image_shape)
    if source is None:
        assert statistics is not None, "an input is features, images or statistics"
        require_extractor(statistics, extractor)
        spatial = set() if statistics.spatial_moments is None else {"spatial_moments"}
        return InputSummary(statistics.source, statistics.moments.n, frozenset({"moments"} | spatial))
    try:
        extractor.check(source.image_shape)
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from None
    found: set[str] = of_features | {"features_ND", "moments", "thumbnails_NP"}
    found |= {"spatial_NS", "spatial_moments"} if extractor.has_spatial else set()
    found |= set() if source.labels_N is None else {"labels_N"}
    if as_reference and statistics and statistics.spatial_moments is None and _usable(statistics, extractor):
        found -= {"spatial_NS", "spatial_moments"}  # FID and sFID are to be of one reference
    shape, remedy = source.image_shape, source.label_remedy
    return InputSummary(source.name, len(source), frozenset(found), source.labels_N, shape, remedy)


def _usable(statistics: Statistics, extractor: FeatureExtractor) -> bool:
    """Whether statistics are of the extractor's features, as far as they say."""
    try:
        require_extractor(statistics, extractor)
    except ValueError:
        return False
    return True


def require_two(sides: Sequence[InputSummary]) -> None:
    """ValueError for samples or a reference with fewer than 2 images."""
    for one in sides:
        if one.count is not None and one.count < 2:
            raise ValueError(f"{one.name} has {one.count} image; an evaluation needs at least 2")


def require_same_shape(sides: Sequence[InputSummary], reference: InputSummary) -> None:
    """ValueError for images of another shape than the reference's."""
    for one in sides:
        if one.image_shape and reference.image_shape and one.image_shape != reference.image_shape:
            found, wanted = ("×".join(map(str, each.image_shape or ())) for each in (one, reference))
            problem = f"{one.name} has images of {found} (channels, height, width), the reference {reference.name}"
            raise ValueError(f"{problem} of {wanted}; make them equal, for instance by --size and --channels")


def require_enough(sides: Sequence[InputSummary]) -> None:
    """ValueError for fewer images than a FID needs."""
    counts = [one.count for one in sides if one.count is not None]
    if counts and min(counts) < FEW:
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
    configs = configs_of(extractor.metrics) if metrics is None else metrics
    planned: list[object] = []
    left_out: list[str] = []
    for config in configs:
        try:
            _require(METRICS.name_of(config), METRICS.build(config), extractor, sides, reference)
            planned.append(config)
        except ValueError as error:
            if metrics is not None:
                raise
            left_out.append(f"left out: {error}")
    return planned, left_out


def _require(
    name: str, metric: Metric, extractor: FeatureExtractor, sides: Sequence[InputSummary], reference: InputSummary
) -> None:
    remedies = {one.name: one.label_remedy for one in sides if one.label_remedy}
    known = [(one.name, one.known) for one in sides]
    problem = unmet_need(name, metric, known, (reference.name, reference.known), remedies)
    if problem is not None:
        raise ValueError(problem)
    counts = [one.count for one in sides if one.count is not None]
    if counts:
        metric.check(min(counts), reference.count)
    classes = extractor.classes
    if classes is None or "labels_N" not in metric.needs_of_samples:
        return
    for one in sides:
        if one.labels_N is not None and int(one.labels_N.max()) >= classes:
            found = f"{one.name} has the label {int(one.labels_N.max())}, and {extractor.name} knows {classes} classes"
            raise ValueError(f"{found}; leave {name} out of --metrics, or choose another --extractor")
