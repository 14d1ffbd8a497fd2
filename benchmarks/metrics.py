"""What the metrics cost: the Fréchet distance against other ways to it, precision and recall, nearest neighbours.

    python -m benchmarks.metrics [--only frechet] [--dim 2048] [--samples 10000] [--reference 50000]

Features are synthetic, with a mean and a spectrum that decays over four decades, in no special basis. Each measurement
runs in a process of its own and prints one JSON line. `peak_MiB` is the highest resident memory of that process, the
features (float32) and all libraries included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from dit_moe.metrics.frechet import expected_floor, frechet_distance
from dit_moe.metrics.manifold import precision_recall
from dit_moe.metrics.moments import FeatureMoments
from dit_moe.metrics.neighbours import nearest_distances

T = TypeVar("T")
DECADES = 4  # of the variance, from the first principal axis to the last
DEAD = 20  # features that are constant, where a covariance is to be singular
ROWS = 2048  # made at a time


def features(count: int, dim: int, seed: int) -> Tensor:
    """float32 [count, dim]; sets of different seeds have the same axes, and a scale and a mean that differ a little."""
    axes_DD = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))).Q
    random = torch.Generator().manual_seed(seed + 1)
    root_DD = torch.logspace(0, -DECADES / 2, dim)[:, None] * axes_DD * (1 + 0.05 * seed)
    rows_ND = torch.empty(count, dim)
    for part_BD in rows_ND.split(ROWS):
        torch.mm(torch.randn(len(part_BD), dim, generator=random), root_DD, out=part_BD)
        part_BD += 0.4 + 0.01 * seed
    return rows_ND


def timed(call: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def show(**facts: Any) -> None:
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    facts |= {"seconds": round(facts["seconds"], 2)} if "seconds" in facts else {}
    print(json.dumps(facts | {"peak_MiB": peak, "threads": torch.get_num_threads()}, ensure_ascii=False), flush=True)


def frechet(dim: int, samples: int, reference: int) -> None:
    from scipy.linalg import sqrtm
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    (x, y), seconds = timed(lambda: [FeatureMoments.of(features(reference, dim, seed)) for seed in (0, 1)])
    show(measured="making features and their moments", n=reference, dim=dim, seconds=seconds)
    covariances = x.covariance(), y.covariance()
    as_numpy = [
        {"mu": each.mean_D.numpy(), "sigma": covariance.numpy()}
        for each, covariance in zip((x, y), covariances, strict=True)
    ]

    def by_root() -> float:
        difference, product = (x.mean_D - y.mean_D).numpy(), as_numpy[0]["sigma"] @ as_numpy[1]["sigma"]
        root = sqrtm(product).trace().real
        return float(difference @ difference + covariances[0].trace() + covariances[1].trace() - 2 * root)

    frechet_distance(x.mean_D[:64], covariances[0][:64, :64], y.mean_D[:64], covariances[1][:64, :64])  # wake threads
    trials = [timed(lambda: frechet_distance(x.mean_D, covariances[0], y.mean_D, covariances[1])) for _ in range(3)]
    ours, our_seconds = sorted(trials, key=lambda trial: trial[1])[1]  # a median: short, so that others' load shows
    show(measured="Fréchet distance", by="ours", n=reference, dim=dim, value=ours, seconds=our_seconds)
    for name, way in {
        "torch-fidelity": lambda: fid_statistics_to_metric(*as_numpy, verbose=False)["frechet_inception_distance"],
        "scipy.linalg.sqrtm": by_root,
    }.items():
        theirs, seconds = timed(way)
        ratio, error = round(our_seconds / seconds, 4), abs(theirs / ours - 1)
        facts = {"seconds": seconds, "ours_to_theirs": ratio, "relative_difference": float(f"{error:.2g}")}
        show(measured="Fréchet distance", by=name, n=reference, dim=dim, value=theirs, **facts)
    for name, less_full in {f"{DEAD} features dead": _dead, "a feature twice": _twice}.items():
        sides = [less_full(each) for each in covariances]
        value, seconds = timed(lambda: frechet_distance(x.mean_D, sides[0], y.mean_D, sides[1]))  # noqa: B023 (called at once)
        show(measured=f"Fréchet distance, {name}", by="ours", n=reference, dim=dim, value=value, seconds=seconds)
        value, seconds = timed(lambda: frechet_distance(x.mean_D, sides[0], y.mean_D, covariances[1]))  # noqa: B023
        show(
            measured=f"Fréchet distance, {name} on one side",
            by="ours",
            n=reference,
            dim=dim,
            value=value,
            seconds=seconds,
        )
    floor, seconds = timed(lambda: expected_floor(covariances[0], reference, reference))
    show(measured="floor estimate", n=reference, dim=dim, value=floor, seconds=seconds)


def _dead(covariance_DD: Tensor) -> Tensor:
    alive_D = torch.arange(len(covariance_DD)) >= DEAD
    return covariance_DD * alive_D * alive_D[:, None]


def _twice(covariance_DD: Tensor) -> Tensor:
    which_D = torch.arange(len(covariance_DD)).clamp(min=1)  # the first is the second once more
    return covariance_DD[which_D][:, which_D]


def manifold(dim: int, samples: int, reference: int) -> None:
    ours, theirs, facts = features(samples, dim, 0), features(reference, dim, 1), {"samples": samples, "dim": dim}
    show(measured="features alone", reference=reference, **facts)
    values, seconds = timed(lambda: precision_recall(ours, theirs))
    show(measured="precision and recall", reference=reference, **facts, **values._asdict(), seconds=seconds)


def nearest(dim: int, samples: int, reference: int) -> None:
    ours, theirs = features(samples, dim, 0), features(reference, dim, 1)
    distances_NK, seconds = timed(lambda: nearest_distances(ours, theirs))
    facts = {"samples": samples, "reference": reference, "dim": dim, "median": distances_NK.median().item()}
    show(measured="nearest neighbours", **facts, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measurements = {each.__name__: each for each in (frechet, manifold, nearest)}
    parser.add_argument("--only", action="append", choices=measurements, help="may be repeated; all by default")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--reference", type=int, default=50_000)
    args = parser.parse_args()
    for name in args.only or measurements:
        sizes = (args.dim, args.samples, args.reference)
        process = multiprocessing.get_context("spawn").Process(target=measurements[name], args=sizes)
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{name} failed")


if __name__ == "__main__":
    main()
