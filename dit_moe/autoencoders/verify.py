"""Are encoded latents what their manifest says? Every byte is read, and a few are decoded to be looked at."""

# n rows of a shard, P pictures, C channels, H height, W width

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from dit_moe.autoencoders.base import FirstStage, Moments
from dit_moe.autoencoders.encode import channel_statistics, mean_and_std
from dit_moe.data import Dataset
from dit_moe.data.manifest import DTYPES, SHARDS, Manifest, read_manifest


def verify(folder: Path, on_images: Callable[[int], object] = lambda count: None) -> Manifest:
    """Check hash, shape, dtype, labels and finiteness of every shard, and the statistics of all of them.

    `on_images(n)` with every shard. ValueError lists the first few things that are wrong, and how many there are.
    """
    manifest = read_manifest(folder)
    problems: list[str] = []
    parts = []
    for shard in manifest.shards:
        content = (folder / SHARDS / shard.file).read_bytes()
        on_images(shard.count)
        if hashlib.sha256(content).hexdigest() != shard.sha256:
            problems.append(f"{shard.file} was changed after it was written")
            continue
        tensors = load(content)
        found = _problem(tensors, manifest, shard.count)
        problems += [f"{shard.file} {found}"] if found else []
        parts += [] if found else [channel_statistics(tensors["moments"])]
    if problems:
        more_of_them = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        remedy = "delete these shards and run `dit-moe encode` again, which makes them anew"
        raise ValueError(f"{folder}: {'; '.join(problems[:3])}{more_of_them}; {remedy}")
    _require_statistics(folder, manifest, parts)
    return manifest


def _require_statistics(folder: Path, manifest: Manifest, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    values = len(manifest) * (2 if manifest.flips else 1) * math.prod(manifest.latent_shape[1:])
    for name, found in zip(("mean", "std"), mean_and_std(parts, values), strict=True):
        stated = getattr(manifest, name)
        if not np.allclose(found, stated, rtol=1e-6, atol=1e-7):  # other machines add in another order
            problem = f"the {name} per channel is {found.tolist()}, the manifest says {list(stated)}"
            remedy = "restore the manifest or delete it and run `dit-moe encode` again"
            raise ValueError(f"{folder}: {problem}; {remedy}")


def _problem(tensors: dict[str, Tensor], manifest: Manifest, count: int) -> str | None:
    moments, labels = tensors["moments"], tensors["labels"]
    shape = (count, 2 if manifest.flips else 1, manifest.moments, *manifest.latent_shape)
    if tuple(moments.shape) != shape or moments.dtype != DTYPES[manifest.dtype]:
        return f"holds {moments.dtype} {tuple(moments.shape)} where the manifest says {manifest.dtype} {shape}"
    if not moments.isfinite().all():
        return "holds NaN or infinity"
    if len(labels) != count or (count and not 0 <= int(labels.min()) <= int(labels.max()) < len(manifest.class_names)):
        return f"has labels outside of the {len(manifest.class_names)} classes"
    return None


@torch.no_grad()
def reconstruct(folder: Path, manifest: Manifest, stage: FirstStage, images: Dataset, count: int) -> Tensor:
    """[2, P, C, H, W] uint8: `count` images spread evenly over the data set, and what their latents decode to."""
    places = np.linspace(0, len(manifest) - 1, min(count, len(manifest))).round().astype(int)
    starts = np.cumsum([0, *[shard.count for shard in manifest.shards]])
    stored, index = [], []
    for place in places.tolist():
        number = int(np.searchsorted(starts, place, side="right")) - 1
        tensors = load((folder / SHARDS / manifest.shards[number].file).read_bytes())
        row = place - int(starts[number])
        stored.append(tensors["moments"][row, 0].float())
        index.append(int(tensors["index"][row]))
    device = next(stage.buffers()).device
    mean = stage.normalize(Moments(torch.stack(stored)[:, 0].to(device))).mean
    originals = images.__getitems__(index)["images"]
    return torch.stack([originals, torch.cat([stage.decode(one[None]).cpu() for one in mean])])
