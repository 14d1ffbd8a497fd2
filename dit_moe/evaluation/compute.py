"""Features of images against those of a reference → a report: every number beside what real images reach."""

# N images compared, D feature width

from __future__ import annotations

import itertools
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from dit_moe.evaluation.features import ExtractedFeatures
from dit_moe.evaluation.report import Distance, Number, Provenance, Report, Value, flat_numbers
from dit_moe.evaluation.requirements import InputSummary, require_known
from dit_moe.extractors import FeatureExtractor, key_of
from dit_moe.metrics import METRICS, FeatureMoments, FeatureSet, Metric, expected_floor

PACKAGES = ("dit_moe", "torch", "torchvision", "torch-fidelity", "timm", "numpy")  # that a number may depend on
SPREADS = 3  # standard errors of a share of so many images
DISTANCES = {"fd": "moments", "sfd": "spatial_moments"}  # value: where its Gaussians are


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
    warnings += _few(n, reference, extractor) + _guessed(numbers, groups, extractor)
    warnings += [] if extractor.caveat is None else [f"{extractor.name}: {extractor.caveat}"]
    return Report(numbers=numbers, provenance=provenance, warnings=warnings)


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


def _guessed(
    numbers: Mapping[str, Number], groups: Mapping[str, Sequence[FeatureSet]], extractor: FeatureExtractor
) -> list[str]:
    """A note if class accuracy is within `SPREADS` standard errors of chance, or below it."""
    accuracy, classes = numbers.get("class_accuracy"), extractor.classes or 1
    if not isinstance(accuracy, Value) or classes < 2:
        return []
    for group, value in (("heldout", accuracy.heldout), ("generated", accuracy.mean)):
        chance, count = 1 / classes, sum(one.count or 0 for one in groups[group])
        if value is not None and value <= chance + SPREADS * math.sqrt(chance * (1 - chance) / max(count, 1)):
            found = f"{value:.3g} is about what guessing gets, {chance:.3g}"
            if group == "heldout":
                return [f"class_accuracy: of held-out images, {found}: {extractor.name} cannot judge these classes"]
            return [f"class_accuracy: {found}: the samples do not show their classes, or are labelled by others"]
    return []
