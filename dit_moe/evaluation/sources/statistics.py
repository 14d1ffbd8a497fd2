"""Statistics in place of images: mean and covariance of features, in a file that ADM's evaluator can read, too."""

# D feature width, S spatial feature width

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_moe.evaluation.sources.base import Statistics
from dit_moe.extractors import FeatureExtractor, inception
from dit_moe.extractors.base import UNKNOWN_EXTRACTOR
from dit_moe.files import atomic_file
from dit_moe.metrics import FeatureSet, GivenMoments
from dit_moe.metrics.frechet import CLAMP

NAMES = ("mu", "sigma", "mu_s", "sigma_s", "n", "extractor")
EXTRACTOR_KEYS = {"name": str, "dim": int, "sha256": str}  # that the record of an extractor has, at least
SYMMETRY = 1e-6  # of the largest entry: what float32 may lose
REMEDY = "make it again from images by --save-stats"


def statistics_of(arrays: Mapping[str, np.ndarray], source: str) -> Statistics:
    """Statistics from the arrays of a file, of which those in `NAMES` are read. Messages begin with `source`.

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
            digest.update(each.covariance_DD.numpy().tobytes())
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


# ------------------------------------------------------------------------------------------------------------- reading


def _moments(
    arrays: Mapping[str, np.ndarray], names: tuple[str, str], n: int | None, source: str
) -> GivenMoments | None:
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
    return GivenMoments(n, torch.from_numpy(mu), torch.from_numpy(sigma))


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
        raise ValueError(f"{source}: n={array.tolist()} is no number of images, 2 or more; {REMEDY}")
    return int(array)


def _read_extractor(array: np.ndarray | None, source: str) -> dict[str, Any] | None:
    if array is None:
        return None
    try:
        found = json.loads(str(array[()]))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{source}: extractor is no JSON object; {REMEDY}")
    for name, kind in EXTRACTOR_KEYS.items():
        if type(found.get(name)) is not kind:
            problem = f"extractor has {name}={found.get(name)!r}; wanted {kind.__name__}"
            raise ValueError(f"{source}: {problem}; {REMEDY}")
    return found
