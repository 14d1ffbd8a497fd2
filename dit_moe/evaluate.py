"""Image sets against a reference: features → Fréchet distance with its floor, class accuracy, nearest neighbours.

Every distance stands beside the one that real images reach. The floor is the distance of held-out images to the
reference, for as many held-out images as generated ones: Fréchet distances shrink as images are added, so numbers at
different N say nothing about each other. The definitions stand in `dit_moe.metrics`.
"""

# N images compared, D feature width, K classes

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from dit_moe.config import require
from dit_moe.data import DATASETS, Dataset
from dit_moe.metrics import (
    EXTRACTORS,
    FeatureExtractor,
    FeatureMoments,
    ImageSet,
    expected_floor,
    frechet_distance,
    nearest_distances,
    read_images,
)
from dit_moe.metrics.digits_cnn import DigitsCNNConfig

Report = dict[str, Any]
RECONSTRUCTION_BATCH = 64
PACKAGES = ("dit_moe", "torch", "numpy", "scikit-learn")  # whose versions a number may depend on


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How a run is judged: how many images of how many sampling seeds, in which feature space."""

    extractor: Annotated[Any, EXTRACTORS] = field(default_factory=DigitsCNNConfig)
    seeds: int = 3  # sampling seeds; the spread over them is reported
    images: int | None = None  # per seed; None: as many as there are held-out images, what they are compared with

    def __post_init__(self) -> None:
        require(self.seeds >= 1, self, "seeds", "must be at least 1")
        require(self.images is None or self.images >= 2, self, "images", "must be at least 2; a spread needs two")


@dataclass(frozen=True)
class Reference:
    """Real images: the ones compared with and, where known, held-out others of the same kind, which give the floor.

    `reconstructed` are the held-out ones once an autoencoder has encoded and decoded them: what stands between the
    floor and the best that a model of its latents can reach.
    """

    name: str
    images: ImageSet
    heldout: ImageSet | None = None
    reconstructed: ImageSet | None = None


def dataset_reference(config: object) -> Reference:
    """The training images of a registered dataset, with its held-out ones."""
    name = DATASETS.name_of(config)
    train, heldout = (_images_of(DATASETS.build(config, split), f"{name}/{split}") for split in ("train", "heldout"))
    return Reference(f"{name}/train", train, heldout)


def file_reference(path: str | Path) -> Reference:
    """The images of an npz. It has no held-out part, so results have no measured floor, only its estimate."""
    images = read_images(path)
    return Reference(images.source, images)


def with_reconstructions(reference: Reference, reconstruct: Callable[[Tensor], Tensor]) -> Reference:
    """`reference`, with what `reconstruct` (uint8 [B, C, H, W] → the same) makes of its held-out images, if any."""
    if reference.heldout is None:
        return reference
    images_NCHW = torch.from_numpy(reference.heldout.images_NHWC).permute(0, 3, 1, 2)
    decoded = [reconstruct(batch).permute(0, 2, 3, 1).numpy() for batch in images_NCHW.split(RECONSTRUCTION_BATCH)]
    source = f"{reference.heldout.source}, reconstructed"
    return replace(reference, reconstructed=ImageSet(np.concatenate(decoded), reference.heldout.labels_N, source))


def _images_of(dataset: Dataset, source: str) -> ImageSet:
    batch = dataset.__getitems__(range(len(dataset)))
    return ImageSet(batch["images"].permute(0, 2, 3, 1).contiguous().numpy(), batch["labels"].numpy(), source)


def evaluate(samples: Sequence[ImageSet], reference: Reference, extractor: FeatureExtractor) -> Report:
    """Compare the images of each sampling seed with the reference.

    Returns a JSON-ready dict; entries that cannot be known are null:

    * ``fd_<extractor>``: Fréchet distance ``generated`` (mean over seeds) and its std, ``floor`` (held-out images),
      ``floor_estimate`` (formula for independent draws; sets of equal class mix come out lower), ``ratio`` generated
      to floor, ``reconstruction`` (held-out images, encoded and decoded) and ``reconstruction_ratio``, the same to
      floor, ``n`` images on the left side of each distance, ``seeds``;
    * ``class_accuracy``: share of images that the extractor takes for their label, mean over seeds, and
      ``class_accuracy_heldout`` and ``class_accuracy_reconstruction``, its share on real images and on reconstructed
      ones. Only from extractors that classify;
    * ``nearest_neighbour``: median distance to the nearest reference image, of generated and of held-out images, in
      features and in pixels (0..255). Far lower for generated ones means copies;
    * ``provenance`` and ``warnings``.

    Each set is thinned evenly to the smallest one. Raises ValueError for no samples, fewer than 2 images, image sizes
    that differ, missing or unknown labels.
    """
    if not samples:
        raise ValueError("there are no samples to evaluate; give the images of at least one sampling seed")
    heldout = [] if reference.heldout is None else [reference.heldout]
    reconstructed = [] if reference.reconstructed is None else [reference.reconstructed]
    smallest = _smallest([*samples, *heldout, *reconstructed], reference.images)
    n = len(smallest)
    train = _View(reference.images, extractor)
    generated = [_View(each.thinned(n), extractor) for each in samples]
    real = [_View(each.thinned(n), extractor) for each in heldout]
    decoded = [_View(each.thinned(n), extractor) for each in reconstructed]

    distances = [view.distance(train) for view in generated]
    floor = _mean([view.distance(train) for view in real])
    reconstruction = _mean([view.distance(train) for view in decoded])
    return {
        f"fd_{extractor.name}": {
            "generated": statistics.fmean(distances),
            "generated_std": statistics.stdev(distances) if len(distances) > 1 else None,
            "floor": floor,
            "floor_estimate": expected_floor(train.moments.covariance(), n, train.moments.n),
            "ratio": statistics.fmean(distances) / floor if floor else None,
            "reconstruction": reconstruction,
            "reconstruction_ratio": reconstruction / floor if floor and reconstruction is not None else None,
            "n": n,
            "seeds": len(distances),
        },
        "class_accuracy": _mean([view.accuracy() for view in generated]),
        "class_accuracy_heldout": _mean([view.accuracy() for view in real]),
        "class_accuracy_reconstruction": _mean([view.accuracy() for view in decoded]),
        "nearest_neighbour": {
            space: {
                "generated": _mean([view.nearest(train, space) for view in generated]),
                "heldout": _mean([view.nearest(train, space) for view in real]),
            }
            for space in ("features", "pixels")
        },
        "provenance": _provenance(samples, reference, extractor, n),
        "warnings": _warnings(samples, smallest, extractor),
    }


class _View:
    """One image set as the metrics see it."""

    def __init__(self, images: ImageSet, extractor: FeatureExtractor) -> None:
        self.set = images
        features_ND, self.logits_NK = extractor(images.images_NHWC)
        self.moments = FeatureMoments.of(features_ND)
        pixels_NP = torch.from_numpy(images.images_NHWC.reshape(len(images), -1))
        self.spaces: dict[str, Tensor] = {"features": features_ND, "pixels": pixels_NP}

    def distance(self, other: _View) -> float:
        a, b = self.moments, other.moments
        return frechet_distance(a.mean_D, a.covariance(), b.mean_D, b.covariance())

    def nearest(self, other: _View, space: str) -> float:
        return nearest_distances(self.spaces[space], other.spaces[space]).median().item()

    def accuracy(self) -> float | None:
        if self.logits_NK is None:
            return None
        labels_N, classes = self.set.labels_N, self.logits_NK.shape[1]
        if labels_N is None:
            raise ValueError(
                f"{self.set.source} has no labels, which the class accuracy needs; save them as `labels` beside arr_0"
            )
        if labels_N.max() >= classes:
            raise ValueError(f"{self.set.source} has the label {labels_N.max()}; the extractor knows {classes} classes")
        return (self.logits_NK.argmax(1).numpy() == labels_N).mean().item()


def _smallest(sets: Sequence[ImageSet], reference: ImageSet) -> ImageSet:
    for each in [reference, *sets]:
        if each.image_shape != reference.image_shape:
            found = f"{each.source} has images of {each.image_shape} (height, width, channels)"
            raise ValueError(f"{found}, the reference {reference.source} of {reference.image_shape}; make them equal")
        if len(each) < 2:
            raise ValueError(f"{each.source} has {len(each)} image; a Fréchet distance needs at least 2")
    return min(sets, key=len)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _warnings(samples: Sequence[ImageSet], smallest: ImageSet, extractor: FeatureExtractor) -> list[str]:
    warnings, n, most = [], len(smallest), max(map(len, samples))
    if n < most:
        warnings.append(f"{most} images of a sampling seed thinned to {n}, as many as {smallest.source} has")
    if n < extractor.dim:
        enough = 2 * extractor.dim
        few = f"{n} images for {extractor.dim} features: distances are mostly sampling error; use at least {enough}"
        warnings.append(few)
    return warnings


def _provenance(samples: Sequence[ImageSet], reference: Reference, extractor: FeatureExtractor, n: int) -> Report:
    return {
        "samples": [each.source for each in samples],
        "reference": reference.name,
        "extractor": extractor.name,
        "sha256": extractor.sha256,
        "dim": extractor.dim,
        "n_gen": n,
        "n_ref": len(reference.images),
        "comparable_to_published": False,  # published numbers are FIDs of 50 000 images
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }
