"""Features of images against those of a reference → a report: every number beside what real images reach.

The floor of a distance is that of held-out images to the reference, for as many held-out images as generated ones:
distances shrink as images are added, so numbers at different N say nothing about each other.
"""

# N images compared, D feature width

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Mapping, Sequence, Set
from importlib.metadata import version
from typing import Any

import torch

from dit_moe.evaluation.extraction import Extracted
from dit_moe.extractors import FeatureExtractor, key_of
from dit_moe.metrics import METRICS, FeatureSet, Metric, Moments, expected_floor

Report = dict[str, Any]
PACKAGES = ("dit_moe", "torch", "torchvision", "torch-fidelity", "timm", "numpy")  # that a number may depend on
DISTANCES = {"fd": "moments", "sfd": "spatial_moments"}  # value: where its Gaussians are
WHAT_LACKS = {  # attribute of a FeatureSet: what is missing without it, and a remedy
    "features_ND": ("images, of which it holds statistics alone", "name the images themselves"),
    "moments": ("statistics of features", "name images, or a file with mu and sigma"),
    "spatial_moments": (
        "spatial features (mu_s and sigma_s in a file of statistics)",
        "make the file again from the images by --save-stats, with --extractor inception",
    ),
    "logits_NK": ("an extractor that classifies", "choose another --extractor"),
    "labels_N": ("labels", "save them as `labels` beside arr_0"),
}


def evaluate(
    samples: Sequence[Extracted],
    reference: Extracted,
    extractor: FeatureExtractor,
    metrics: Sequence[object] | None = None,
    *,
    heldout: Extracted | None = None,
    reconstructed: Extracted | None = None,
    device: torch.device | str = "cpu",
) -> Report:
    """Compare the images of each sampling seed with the reference.

    Args:
        samples: one set for each sampling seed.
        reference: images, statistics, or both.
        extractor: what their features were made by.
        metrics: configs of METRICS; None takes those that suit the extractor, without what some side lacks.
        heldout: real images that are not in the reference: they give the floor.
        reconstructed: these once an autoencoder has encoded and decoded them: about the best that its latents allow.
        device: where the metrics compute.

    Returns a JSON-ready dict; entries that cannot be known are null. <space> is the extractor's name; with the verified
    Inception ``fd_<space>`` is ``fid``, ``sfd_<space>`` is ``sfid``, and the others stand without it:

    * ``fd_<space>``, ``sfd_<space>``: Fréchet distance ``generated`` (mean over seeds), its std over them, ``floor``
      (of held-out images), ``floor_estimate`` (formula for independent draws; sets of equal class mix come out lower),
      ``ratio`` generated to floor, ``reconstruction`` and ``reconstruction_ratio``, the same to floor, ``n`` images on
      the left side of each distance, ``n_reference``, ``seeds``;
    * of any other value v: ``v_<space>``, mean over seeds, and ``…_std``, ``…_heldout`` and ``…_reconstruction``;
    * ``provenance`` and ``warnings``.

    Each set is thinned evenly to the smallest one. Raises ValueError for no samples, fewer than 2 images, and where a
    metric that was asked for lacks what it needs.
    """
    if not samples:
        raise ValueError("there are no samples to evaluate; give the images of at least one sampling seed")
    others = {"heldout": heldout, "reconstruction": reconstructed}
    groups = {"generated": list(samples)} | {name: [] if one is None else [one] for name, one in others.items()}
    smallest = _smallest([one.features for group in groups.values() for one in group])
    n = smallest.count
    sets = {name: [_thinned(one.features, n) for one in group] for name, group in groups.items()}
    built, left_out = _build(metrics, extractor, sets, reference.features, device)
    report: Report = {}
    for metric in built.values():
        for value, found in _values(metric, sets, reference.features).items():
            key = key_of(value, extractor.name, extractor.is_fid) if metric.in_feature_space(value) else value
            if value in DISTANCES:
                report[key] = _distance(found, sets, reference.features, DISTANCES[value], n)
            else:
                report |= _flat(key, found)
    report["provenance"] = {
        "samples": [one.described for one in samples],
        "reference": reference.described,
        "heldout": None if heldout is None else heldout.described,
        "reconstruction": None if reconstructed is None else reconstructed.described,
        "extractor": extractor.identity() | {"is_fid": extractor.is_fid},
        "n_gen": n,
        "n_ref": reference.features.count,
        "metrics": {name: metric.settings() for name, metric in built.items()},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }
    report["warnings"] = [*left_out, *_warnings(samples, smallest, reference, extractor, built)]
    return report


def require_two(counts: Mapping[str, int | None]) -> None:
    """ValueError for a set, by name, of fewer than 2 images."""
    for name, count in counts.items():
        if count is not None and count < 2:
            raise ValueError(f"{name} has {count} image; a Fréchet distance needs at least 2")


def _smallest(sets: Sequence[FeatureSet]) -> FeatureSet:
    require_two({each.source: each.count for each in sets})
    return min(sets, key=lambda each: math.inf if each.count is None else each.count)


def _thinned(one: FeatureSet, n: int | None) -> FeatureSet:
    """Statistics stay as they are."""
    return one if n is None or one.features_ND is None else one.thinned(n)


def _build(
    metrics: Sequence[object] | None,
    extractor: FeatureExtractor,
    sets: dict[str, list[FeatureSet]],
    reference: FeatureSet,
    device: torch.device | str,
) -> tuple[dict[str, Metric], list[str]]:
    """Metrics by name, and why others of the extractor's were left out."""
    configs = [METRICS.config_class(name)() for name in extractor.metrics] if metrics is None else metrics
    sides = [(one.source, one.known) for group in sets.values() for one in group]
    built: dict[str, Metric] = {}
    left_out: list[str] = []
    for config in configs:
        name, metric = METRICS.name_of(config), METRICS.build(config, device)
        problem = lacking(name, metric, sides, (reference.source, reference.known))
        if problem is None:
            built[name] = metric
        elif metrics is not None:
            raise ValueError(problem)
        else:
            left_out.append(f"left out: {problem}")
    return built, left_out


Side = tuple[str, Set[str]]  # what it is called, and the attributes of a FeatureSet that are known of it


def lacking(name: str, metric: Metric, samples: Sequence[Side], reference: Side) -> str | None:
    """What some side lacks that the metric `name` needs, and the remedy; None if nothing."""
    wanted = [(*side, metric.needs | metric.needs_of_samples) for side in samples]
    for source, known, attributes in [*wanted, (*reference, metric.needs)]:
        for attribute in sorted(attributes - known):
            what, remedy = WHAT_LACKS[attribute]
            return f"{name} needs {what}, and {source} has none; {remedy}, or leave {name} out of --metrics"
    return None


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


def _flat(key: str, found: dict[str, list[float]]) -> Report:
    return {
        key: _mean(found["generated"]),
        f"{key}_std": _std(found["generated"]),
        f"{key}_heldout": _mean(found["heldout"]),
        f"{key}_reconstruction": _mean(found["reconstruction"]),
    }


def _distance(
    found: dict[str, list[float]], sets: dict[str, list[FeatureSet]], reference: FeatureSet, where: str, n: int | None
) -> Report:
    generated, floor, reconstruction = (_mean(found[group]) for group in ("generated", "heldout", "reconstruction"))
    moments: Moments = getattr(reference, where)
    return {
        "generated": generated,
        "generated_std": _std(found["generated"]),
        "floor": floor,
        "floor_estimate": None if n is None else expected_floor(moments.covariance(), n, moments.n),
        "ratio": _ratio(generated, floor),
        "reconstruction": reconstruction,
        "reconstruction_ratio": _ratio(reconstruction, floor),
        "n": n,
        "n_reference": moments.n,
        "seeds": len(found["generated"]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _ratio(value: float | None, floor: float | None) -> float | None:
    return None if value is None or not floor else value / floor


def _warnings(
    samples: Sequence[Extracted],
    smallest: FeatureSet,
    reference: Extracted,
    extractor: FeatureExtractor,
    metrics: dict[str, Metric],
) -> list[str]:
    warnings, n, most = [], smallest.count or 0, max(one.features.count or 0 for one in samples)
    if n < most:
        warnings.append(f"{most} images of a sampling seed thinned to {n}, as many as {smallest.source} has")
    fewest = min(n, reference.features.count or n)
    if fewest < extractor.dim:
        enough = 2 * extractor.dim
        few = (
            f"{fewest} images for {extractor.dim} features: distances are mostly sampling error; use at least {enough}"
        )
        warnings.append(few)
    for name, metric in metrics.items():
        warnings += [f"{name}: {note}" for note in metric.notes(smallest, reference.features)]
    return warnings
