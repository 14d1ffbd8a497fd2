"""Metrics of image sets: images → features → statistics → numbers. A new extractor is a new file here."""

from dit_moe.metrics.features import EXTRACTORS, FeatureExtractor, Features
from dit_moe.metrics.frechet import expected_floor, frechet_distance
from dit_moe.metrics.image_writer import image_writer, write_images
from dit_moe.metrics.images import ImageSet, read_images
from dit_moe.metrics.moments import FeatureMoments
from dit_moe.metrics.neighbours import nearest_distances
from dit_moe.registry import import_submodules

import_submodules(__name__, __path__)

__all__ = [
    "EXTRACTORS",
    "FeatureExtractor",
    "FeatureMoments",
    "Features",
    "ImageSet",
    "expected_floor",
    "frechet_distance",
    "image_writer",
    "nearest_distances",
    "read_images",
    "write_images",
]
