"""An npz file as ADM's evaluator, `dit-moe sample` and --save-stats write it: images, statistics, or both.

Statistics stand in place of images: mean and covariance of features.
"""

# N images, B images of a batch, C channels, H height, W width, D feature width, S spatial feature width

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from dit_moe.config import convert, shown
from dit_moe.data.listing import PassedOver, facts_of_listing, pass_over, say_passed_over
from dit_moe.data.npz import NpzFile, Rows, require_images, require_labels, require_shape
from dit_moe.distributed import on_main
from dit_moe.evaluation.sources.base import (
    EvaluationInput,
    ReadOptions,
    Source,
    Statistics,
    facts_of_images,
    sha256_of_labels,
)
from dit_moe.extractors import FeatureExtractor, inception
from dit_moe.extractors.base import UNKNOWN_EXTRACTOR
from dit_moe.files import atomic_file
from dit_moe.formatting import first_few
from dit_moe.json_files import Name, Size, parse
from dit_moe.metrics import FeatureMoments, FeatureSet
from dit_moe.metrics.frechet import CLAMP

IMAGES, LABELS = "arr_0", ("labels", "arr_1")  # of np.savez(file, images, labels), as ADM has them
BLOCK = 2**26  # bytes of floats that are checked together
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s", "n", "extractor")
SYMMETRY = 1e-6  # of the largest entry: what float32 may lose
REMEDY = "make it again from images by --save-stats"


def open_npz(path: str | Path, options: ReadOptions | None = None) -> EvaluationInput:
    """Images (``arr_0``, with ``labels`` or ``arr_1``), statistics (``mu``, ``sigma``), or both.

    Float images become uint8 if `options` gives their range: a value stands for the nearest of 256 levels, the lowest
    and the highest of which are the ends of the range. `options.size` and `channels` are left to `converted`.

    Raises ValueError, beginning with the file: not a readable npz, or what it holds cannot be evaluated.
    """
    file = NpzFile(Path(path))
    arrays = {name: file.read(name) for name in STATISTICS if name in file}
    statistics = statistics_of(arrays, str(path)) if {"mu", "sigma"} & arrays.keys() else None
    if IMAGES in file:
        return EvaluationInput(NpzSource(file, options or ReadOptions()), statistics)
    if statistics is None:
        raise ValueError(f"{path} {_lacking(file)}")
    return EvaluationInput(statistics=statistics)


def _lacking(file: NpzFile) -> str:
    """What a zip without images and statistics holds in their place, and the remedy."""
    members = file.archive.namelist()
    if any(name.endswith(".npy") for name in members) or not members:
        wanted = f"save images as {IMAGES}, or statistics as mu and sigma"
        return f"has no array {IMAGES} but {', '.join(file.names) or 'none'}; {wanted}"
    found = first_few(members)
    if any(name.endswith("data.pkl") for name in members):  # as torch.save writes them
        return f"is the weights of a network ({found}); name its images, or a run of dit-moe train"
    return f"is a zip of other files ({found}); unpack it and name the folder"


class NpzSource(Source):
    """The images of an npz."""

    def __init__(self, file: NpzFile, options: ReadOptions) -> None:
        self.file, self.name = file, str(file.path)
        self.passed_over: PassedOver = {}
        for other in set(file.names).difference((IMAGES, *LABELS, *STATISTICS)):
            pass_over(self.passed_over, "arrays of other names", other)
        say_passed_over(self.name, self.passed_over)
        self.images: Rows = file.array(IMAGES)
        self.range: tuple[float, float] | None = None
        if np.issubdtype(self.images.dtype, np.floating):
            self.range = options.value_range
            on_main(self._require_floats)  # reads all of them
        else:
            require_images(self.images, self.name)
        count, height, width, channels = self.images.shape
        self.image_shape = (channels, height, width)
        found = next((file.read(name) for name in LABELS if name in file), None)
        require_labels(found, count, self.name)
        self.labels_N = None if found is None else torch.from_numpy(found.astype(np.int64))

    def __len__(self) -> int:
        return self.images.shape[0]

    def identity(self) -> dict[str, Any]:
        """Of the images and labels as they are in the file, and of the range of floats. Reads them all, once."""
        identity = {
            "kind": "images",
            "sha256": self._sha256,
            "labels_sha256": sha256_of_labels(self.labels_N),
            "shape": list(self.images.shape),
            "dtype": str(self.images.dtype),
        }
        return identity | ({"range": list(self.range)} if self.range else {})

    def facts(self) -> dict[str, Any]:
        return facts_of_images(self.file.path) | facts_of_listing(self)

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        for part in parts:
            found_BHWC = self.images[np.asarray(part, dtype=np.int64)]
            images_BHWC = found_BHWC if self.range is None else np.empty(found_BHWC.shape, np.uint8)
            if self.range is not None:
                for image, found in zip(images_BHWC, found_BHWC, strict=True):
                    image[:] = _levels(found, *self.range)
            yield torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).contiguous()

    @cached_property
    def _sha256(self) -> str:
        return self.file.sha256(IMAGES, self.images)

    def _require_floats(self) -> None:
        """ValueError unless all values are finite, and within the range once they are rounded to its levels.

        NaN and infinity come first: rounded to uint8, as another message asks for, they would be lost.
        """
        require_shape(self.images.shape, self.name)
        problem: str | None = None
        values = math.prod(self.images.shape[1:])
        step = max(1, BLOCK // (values * self.images.dtype.itemsize))
        for start in range(0, len(self), step):
            block = self.images[start : start + step].reshape(-1, values)
            lows, highs = block.min(1), block.max(1)  # NaN, where there is one
            finite = np.isfinite(lows) & np.isfinite(highs)
            if not finite.all():
                found = f"image {start + int(finite.argmin())} holds NaN or infinity"
                raise ValueError(f"{self.name}: {found}; find out why the sampler made it, it cannot be evaluated")
            if self.range is None or problem is not None:
                continue
            outside = (_levels(lows, *self.range) < 0) | (_levels(highs, *self.range) > 255)
            if outside.any():
                bad = int(outside.argmax())
                problem = f"image {start + bad} has values from {lows[bad]:g} to {highs[bad]:g}"
        if self.range is None:
            wanted = "save them as uint8 0..255, or say what is black and white, for instance --range=-1,1"
            raise ValueError(f"{self.name}: images have dtype {self.images.dtype}; {wanted}")
        if problem is not None:
            given = f"outside of --range={self.range[0]:g},{self.range[1]:g}"
            remedy = "give the range that the sampler means, or clip them"
            raise ValueError(f"{self.name}: {problem}, {given}; {remedy}")


def _levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Whole levels of grey, 0 at `low` and 255 at `high`; halves go up, as where first stages make uint8 of floats."""
    return np.floor((values.astype(np.float64) - low) * (255 / (high - low)) + 0.5)


# ---------------------------------------------------------------------------------------------------------- statistics


def statistics_of(arrays: Mapping[str, np.ndarray], source: str) -> Statistics:
    """Statistics from the arrays of a file, of which those in `STATISTICS` are read. Messages begin with `source`.

    Raises ValueError: one of a pair is missing, shapes do not fit, NaN or infinity, or sigma is no covariance.
    """
    n, extractor = _read_count(arrays.get("n"), source), _read_extractor(arrays.get("extractor"), source)
    moments, spatial = (_moments(arrays, names, n, source) for names in (("mu", "sigma"), ("mu_s", "sigma_s")))
    if moments is None:
        raise ValueError(f"{source} has neither mu nor sigma; {REMEDY}")
    digest = hashlib.sha256(json.dumps([n, extractor], sort_keys=True).encode())
    for each in (moments, spatial):
        if each is not None:
            digest.update(each.mean_D.numpy().tobytes())
            digest.update(each.covariance().numpy().tobytes())
    return Statistics(source, digest.hexdigest(), moments, spatial, extractor)


def write_statistics(path: str | Path, feature_set: FeatureSet, extractor: FeatureExtractor) -> None:
    """Write the moments of a set, of how many images they are, and by which extractor; complete or not at all.

    Raises ValueError for fewer than 2 images, which have no covariance.
    """
    assert feature_set.moments is not None, "a set has features or moments"
    arrays = {"mu": feature_set.moments.mean_D.double(), "sigma": feature_set.moments.covariance().double()}
    if (spatial := feature_set.spatial_moments) is not None:
        arrays |= {"mu_s": spatial.mean_D.double(), "sigma_s": spatial.covariance().double()}
    found: dict[str, Any] = {name: tensor.numpy() for name, tensor in arrays.items()}
    width = len(feature_set.moments.mean_D)
    found["extractor"] = json.dumps({**extractor.identity(), "dim": width})
    if feature_set.moments.n is not None:
        found["n"] = feature_set.moments.n
    with atomic_file(Path(path)) as file:
        np.savez(file, **found)


def require_extractor(statistics: Statistics, extractor: FeatureExtractor) -> str | None:
    """ValueError if the statistics are of another extractor's features, by the file's record or by their number.

    Returns a warning if the file does not name its extractor.
    """
    width, found = len(statistics.moments.mean_D), statistics.extractor
    wanted = json.loads(json.dumps({"dim": extractor.dim or width, **extractor.identity()}))  # as a file has it
    name, sha256 = extractor.name, extractor.sha256[:12]
    if found is not None and found != wanted:
        theirs = f"{found.get('name')} (weights {str(found.get('sha256'))[:12]})"
        differing = sorted(key for key in {**found, **wanted} if found.get(key) != wanted.get(key))
        problem = f"is of the features of {theirs}, not of {name} (weights {sha256}): {', '.join(differing)} differ"
        remedy = f"choose --extractor {found.get('name')}, or {REMEDY}"
        raise ValueError(f"{statistics.source} {problem}; {remedy}")
    if extractor.dim and width != extractor.dim:
        problem = f"is of {width} features, but {name} (weights {sha256}) has {extractor.dim}"
        remedy = f"choose another --extractor, or {REMEDY}"
        raise ValueError(f"{statistics.source} {problem}; {remedy}")
    if found is None:
        warning = f"{statistics.source} does not say which extractor made it"
        assumed = f"; it is taken for {name} (weights {sha256}), which has as many features, {width}"
        return warning if name == UNKNOWN_EXTRACTOR else warning + assumed
    return None


def is_verified_inception(extractor: Mapping[str, Any] | None, width: int) -> bool:
    """Whether a file's record of its extractor, beside means of `width`, is that of the verified Inception.

    Its entry `is_fid`, if any, is not relied on.
    """
    official = {"name": "inception", "dim": inception.DIM, "sha256": inception.SHA256, "resize": inception.RESIZE}
    return extractor is not None and width == inception.DIM and official.items() <= extractor.items()


def _moments(
    arrays: Mapping[str, np.ndarray], names: tuple[str, str], n: int | None, source: str
) -> FeatureMoments | None:
    """None if the file has neither the mean nor the covariance of these names."""
    present = [name for name in names if name in arrays]
    if not present:
        return None
    for name in names:
        if name not in arrays:
            raise ValueError(f"{source} has {present[0]} but no {name}; {REMEDY}")
        if not np.issubdtype(arrays[name].dtype, np.floating):
            raise ValueError(f"{source}: {name} has dtype {arrays[name].dtype}; save it as float64")
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{source}: {name} holds NaN or infinity; {REMEDY}")
    mu, sigma = (np.ascontiguousarray(arrays[name], dtype=np.float64) for name in names)
    if mu.ndim != 1 or mu.size == 0 or sigma.shape != mu.shape * 2:
        raise ValueError(
            f"{source}: {names[0]} has shape {mu.shape} and {names[1]} {sigma.shape}; wanted [D] and [D, D]"
        )
    if problem := _covariance_problem(torch.from_numpy(sigma)):
        raise ValueError(f"{source}: {names[1]} is no covariance, {problem}; {REMEDY}")
    return FeatureMoments(n, torch.from_numpy(mu), torch.from_numpy(sigma))


def _covariance_problem(sigma_DD: Tensor) -> str | None:
    asymmetry = (sigma_DD - sigma_DD.T).abs().max()
    if asymmetry > SYMMETRY * sigma_DD.abs().max():
        return f"it is not symmetric (by {asymmetry:.3g})"
    if not sigma_DD.any():  # of features that are all equal
        return None
    allowed = CLAMP * sigma_DD.trace()  # below 0, as the Fréchet distance does; Cholesky is faster than eigenvalues
    _, failed = torch.linalg.cholesky_ex(sigma_DD + allowed * torch.eye(len(sigma_DD), dtype=torch.float64))
    return "it has a negative eigenvalue, beyond rounding in float64" if failed else None


def _read_count(array: np.ndarray | None, source: str) -> int | None:
    if array is None:
        return None
    if array.shape != () or not np.issubdtype(array.dtype, np.integer) or array < 2:
        found = array.tolist() if array.size == 1 else f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"{source}: n={str(found)[:80]} is no number of images, 2 or more; {REMEDY}")
    return int(array)


class _Extractor(TypedDict):
    """What the record of an extractor has, at least."""

    name: Name
    dim: Size
    sha256: str


def _read_extractor(array: np.ndarray | None, source: str) -> dict[str, Any] | None:
    if array is None:
        return None
    try:
        return dict(convert(_Extractor, parse(str(array[()]))))
    except ValueError as error:
        raise ValueError(f"{source}: extractor={shown(array)} is no record of one ({error}); {REMEDY}") from None
