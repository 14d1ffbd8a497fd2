"""Are encoded latents what their manifest says? Every byte is read, and a few are decoded to be looked at."""

# n rows of a shard, P pictures, C channels, H height, W width

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from dit_moe.data import Dataset
from dit_moe.data.manifest import DTYPES, SHARDS, Manifest, read_manifest
from dit_moe.latents.base import FirstStage, Moments
from dit_moe.latents.encode import channel_statistics


def verify(folder: Path, on_images: Callable[[int], object] = lambda count: None) -> Manifest:
    """Check hash, shape, dtype, labels and finiteness of every shard, and the statistics of all of them.

    `on_images(n)` after every shard. ValueError lists the first few things that are wrong, and how many there are.
    """
    manifest = read_manifest(folder)
    problems: list[str] = []
    sums, squares = np.zeros((2, manifest.latent_shape[0]))
    for shard in manifest.shards:
        content = (folder / SHARDS / shard.file).read_bytes()
        if hashlib.sha256(content).hexdigest() != shard.sha256:
            problems.append(f"{shard.file} was changed after it was written")
            continue
        tensors = load(content)
        found = _problem(tensors, manifest, shard.count)
        problems += [f"{shard.file} {found}"] if found else []
        more = channel_statistics(tensors["moments"])
        sums, squares = sums + more[0], squares + more[1]
        on_images(shard.count)
    values = len(manifest) * (2 if manifest.flips else 1) * manifest.latent_shape[1] * manifest.latent_shape[2]
    if not problems and not np.allclose(sums / values, manifest.mean, rtol=1e-9, atol=1e-12):
        problems.append(f"the mean per channel is {(sums / values).tolist()}, the manifest says {list(manifest.mean)}")
    if problems:
        more_of_them = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        remedy = "delete these shards and run `dit-moe encode` again, which makes them anew"
        raise ValueError(f"{folder}: {'; '.join(problems[:3])}{more_of_them}; {remedy}")
    return manifest


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
