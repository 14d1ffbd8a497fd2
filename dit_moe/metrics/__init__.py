"""Features → statistics → numbers, as pure functions. A new metric is a new file here."""

from dit_moe.metrics.base import METRICS, FeatureSet, Metric, configs_of
from dit_moe.metrics.frechet import expected_floor, frechet_distance
from dit_moe.metrics.moments import FeatureMoments
from dit_moe.metrics.neighbours import nearest_distances
from dit_moe.registry import import_submodules

import_submodules(__name__, __path__)

__all__ = [
    "METRICS",
    "FeatureMoments",
    "FeatureSet",
    "Metric",
    "configs_of",
    "expected_floor",
    "frechet_distance",
    "nearest_distances",
]
