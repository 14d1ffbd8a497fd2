"""Features of images against those of a reference → a report: every number beside what real images reach."""

# N images compared, D feature width

from __future__ import annotations

import itertools
import platform
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from dit_moe.data.listing import are_numbers
from dit_moe.evaluation.features import ExtractedFeatures, FeatureFolder
from dit_moe.evaluation.report import Distance, Number, Provenance, Report, Value, flat_numbers
from dit_moe.evaluation.sources.base import EvaluationInput
from dit_moe.evaluation.sources.npz import require_extractor
from dit_moe.extractors import FeatureExtractor, key_of
from dit_moe.metrics import METRICS, FeatureMoments, FeatureSet, Metric, configs_of, expected_floor

PACKAGES = ("dit_moe", "torch", "torchvision", "torch-fidelity", "timm", "numpy")  # that a number may depend on
DISTANCES = {"fd": "moments", "sfd": "spatial_moments"}  # value: where its Gaussians are
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


def compute_report(
    samples: Sequence[ExtractedFeatures],
    reference: ExtractedFeatures,
    extractor: FeatureExtractor,
    metrics: Sequence[object],
    *,
    heldout: ExtractedFeatures | None = None,
    reconstructed: ExtractedFeatures | None = None,
    noise: ExtractedFeatures | None = None,
    space: str | None = None,
    device: torch.device | str = "cpu",
) -> Report:
    """Compare the images of each sampling seed with the reference.

    Args:
        samples: one set for each sampling seed.
        reference: images, statistics, or both.
        extractor: what their features were made by.
        metrics: configs of METRICS.
        heldout: real images that are not in the reference: they give the floor.
        reconstructed: these once an autoencoder has encoded and decoded them: about the best that its latents allow.
        noise: of as many images as the samples: they give the far end of the Fréchet distance.
        space: the name of the feature space, if not the extractor's; no number is then a FID.
        device: where the metrics compute.

    Sets are thinned evenly to the smallest one, for metrics that compare; statistics cannot be, so beside them the
    others are thinned to their count, or left out where they have fewer images. Raises ValueError for no samples, and
    where a metric does not have what it needs.
    """
    if not samples:
        raise ValueError("there are no samples to evaluate; give the images of at least one sampling seed")
    others = {"heldout": heldout, "reconstruction": reconstructed}
    groups = {"generated": [one.features for one in samples]}
    groups |= {name: [] if one is None else [one.features] for name, one in others.items()}
    n, equal, warnings = _equalised(groups)
    built = {METRICS.name_of(config): METRICS.build(config, device) for config in metrics}
    numbers: dict[str, Number] = {}
    better: dict[str, str | None] = {}
    for name, metric in built.items():
        sets = equal if metric.needs else groups  # what looks at one set alone needs no equals
        *sides, real = (
            InputSummary(one.source, one.count, one.known)
            for one in [*itertools.chain(*sets.values()), reference.features]
        )
        require_known(name, metric, sides, real)
        for value, found in _values(metric, sets, reference.features).items():
            in_space = metric.in_feature_space(value)
            key = key_of(value, space or extractor.name, extractor.is_fid and space is None) if in_space else value
            about: dict[str, Any] = {}
            if value in DISTANCES:
                moments: FeatureMoments = getattr(reference.features, DISTANCES[value])
                floor = None if n is None else expected_floor(moments.covariance(), n, moments.n)
                about = {"floor_estimate": floor, "n": n, "n_reference": moments.n}
                if noise is not None and n is not None and value == "fd":
                    about["noise"] = metric(noise.features.thinned(n), reference.features)[value]
            numbers[key] = _number(value, found, **about)
            better[key] = metric.better
        warnings += [f"{name}: {note}" for note in metric.notes(sets["generated"][0], reference.features)]
    images, given = reference.features.features_ND, reference.features.moments
    provenance = Provenance(
        samples=[one.described for one in samples],
        reference=reference.described,
        heldout=None if heldout is None else heldout.described,
        reconstruction=None if reconstructed is None else reconstructed.described,
        extractor=_space(extractor, space),
        n_gen=n,
        n_ref_images=None if images is None else len(images),
        n_ref_statistics=None if given is None else given.n,
        metrics={name: metric.settings() for name, metric in built.items()},
        better=better,
        versions={"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    )
    caveats = [] if extractor.caveat is None else [f"{extractor.name}: {extractor.caveat}"]
    return Report(numbers=numbers, provenance=provenance, warnings=warnings + _few(n, reference, extractor) + caveats)


def number_names(
    extractor: FeatureExtractor, metrics: Sequence[object], *, heldout: bool, reconstructed: bool, seeds: int
) -> list[str] | None:
    """Names in `Report.flat` of the numbers that an evaluation of images will have, before it is made.

    None if some metric does not name its values.

    Args:
        heldout, reconstructed: whether there will be held-out images, and these once an autoencoder has had them.
    """
    numbers: dict[str, Number] = {}
    for each in metrics:
        values = METRICS.factory(each).values
        if values is None:
            return None
        metric: Metric = METRICS.build(each)
        found = {"generated": [1.0] * seeds, "heldout": [1.0] * heldout, "reconstruction": [1.0] * reconstructed}
        for value in values:
            key = key_of(value, extractor.name, extractor.is_fid) if metric.in_feature_space(value) else value
            numbers[key] = _number(value, found, floor_estimate=1.0, n=1, n_reference=1)
    return list(flat_numbers(numbers))


def _number(value: str, found: Mapping[str, Sequence[float]], **about: Any) -> Number:
    """A number by what was `found` for generated, held-out and reconstructed images; `about` is of distances alone."""
    generated, heldout, reconstruction = (_mean(found[group]) for group in ("generated", "heldout", "reconstruction"))
    if value in DISTANCES:
        return Distance(
            generated=generated,
            generated_std=_std(found["generated"]),
            floor=heldout,
            ratio=_ratio(generated, heldout),
            reconstruction=reconstruction,
            reconstruction_ratio=_ratio(reconstruction, heldout),
            seeds=len(found["generated"]),
            **about,
        )
    if value.endswith("_std"):  # a spread within a set, over its splits or subsets
        return generated
    return Value(mean=generated, std=_std(found["generated"]), heldout=heldout, reconstruction=reconstruction)


def _space(extractor: FeatureExtractor, space: str | None) -> dict[str, Any]:
    facts = extractor.identity() | {"dim": extractor.dim, "is_fid": extractor.is_fid and space is None}
    facts |= {} if extractor.classes is None else {"classes": extractor.classes}
    facts |= {} if extractor.caveat is None else {"caveat": extractor.caveat}
    return facts if space is None else facts | {"name": space, "taken_for": extractor.name}


def _equalised(groups: dict[str, list[FeatureSet]]) -> tuple[int | None, dict[str, list[FeatureSet]], list[str]]:
    """The count of all sets, the sets at that count, and what a reader has to know about it."""
    every = [one for group in groups.values() for one in group]
    statistics_only = [one for one in groups["generated"] if one.features_ND is None]
    if not statistics_only:
        smallest = min(every, key=lambda one: one.count or 0)
        n, most = smallest.count or 0, max(groups["generated"], key=lambda one: one.count or 0)
        thinned = f"{most.count} images of {most.source} thinned to {n}, as many as {smallest.source} has"
        equal = {name: [one.thinned(n) for one in group] for name, group in groups.items()}
        return n, equal, [] if n == most.count else [thinned]
    counts = {one.count for one in groups["generated"]}
    fixed = counts.pop() if len(counts) == 1 else None
    equal, warnings = {"generated": groups["generated"]}, []
    for name in ("heldout", "reconstruction"):
        fit = [one for one in groups[name] if fixed is not None and (one.count or 0) >= fixed]
        equal[name] = [one.thinned(fixed or 0) for one in fit]
        if groups[name] and not fit:
            of, count = "an unknown number of" if fixed is None else fixed, groups[name][0].count
            given = statistics_only[0].source
            warnings.append(f"no {name} beside it: {given} is of {of} images, and there are {count}")
    return fixed, equal, warnings


def _values(
    metric: Metric, sets: dict[str, list[FeatureSet]], reference: FeatureSet
) -> dict[str, dict[str, list[float]]]:
    """value → group → numbers."""
    found: dict[str, dict[str, list[float]]] = {}
    for group, each in sets.items():
        for one in each:
            for value, number in metric(one, reference).items():
                found.setdefault(value, {name: [] for name in sets})[group].append(number)
    return found


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _ratio(value: float | None, floor: float | None) -> float | None:
    return None if value is None or not floor else value / floor


def _few(n: int | None, reference: ExtractedFeatures, extractor: FeatureExtractor) -> list[str]:
    moments = reference.features.moments
    counts = [count for count in (n, None if moments is None else moments.n) if count is not None]
    if not counts or min(counts) >= extractor.dim:
        return []
    few = f"{min(counts)} images for {extractor.dim} features: distances are mostly sampling error"
    same = "and compare ratios only at the same number of images"
    return [f"{few}; use at least {2 * extractor.dim}, {same}"]


# ------------------------------------------------------------------------------------------------ what can be computed


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


def outline(given: EvaluationInput) -> InputSummary:
    """What is known whatever the extractor."""
    images, statistics = given.images, given.statistics
    if images is None:
        assert statistics is not None, "an input is features, images or statistics"
        return InputSummary(statistics.source, statistics.moments.n, frozenset())
    names = images.class_names
    return InputSummary(
        images.name,
        len(images),
        frozenset(),
        images.labels_N,
        images.image_shape,
        images.label_remedy,
        None if names is None or are_numbers(names) else names,
    )


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

    Names that are no numbers are numbered in sorted order, which is right at most if there is one for every class.
    """
    if (count := extractor.classes) is None:
        return
    for one in sides:
        most, names = -1 if one.labels_N is None else int(one.labels_N.max()), one.class_names
        remedy = f"leave {name} out of --metrics, or choose another --extractor"
        if most >= count:
            raise ValueError(f"{one.name} has the label {most}, and {extractor.name} knows {count} classes; {remedy}")
        if names and len(names) != count:
            found = (
                f"{one.name} has {len(names)} classes, {names[0]} first, and {extractor.name} knows {count}, by number"
            )
            raise ValueError(f"{found}; name the folders 0 to {count - 1}, {remedy}")


def _require_same_names(name: str, sides: Sequence[InputSummary], reference: InputSummary) -> None:
    """ValueError if a side has a class that the reference does not name, so that its number is not known."""
    known = reference.class_names or ()
    for one in sides:
        missing = sorted(set(one.class_names or ()) - set(known))
        if known and missing:
            found = f"{one.name} has the class {missing[0]}, which is none of the {len(known)} of {reference.name}"
            raise ValueError(f"{found}; rename its folder, or leave {name} out of --metrics")
