"""What `dit-moe encode` does: encode the images of an experiment, and verify the latents that were made of them."""

# P pictures, C channels, H height, W width

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from dit_moe.autoencoders.autoencoder import Autoencoder, AutoencoderConfig
from dit_moe.autoencoders.base import FIRST_STAGES, FirstStage
from dit_moe.autoencoders.encoder import EncodeConfig, Encoder
from dit_moe.autoencoders.reconstructions import SHOWN, reconstruction_grid, spread
from dit_moe.autoencoders.statistics import channel_statistics, mean_and_std
from dit_moe.config import ConfigError, section
from dit_moe.data import DATASETS, Dataset
from dit_moe.data.held_out import names_heldout, require_held_out
from dit_moe.data.latents import SHARDS, LatentsConfig, LatentShards, Manifest, read_manifest
from dit_moe.distributed import join_processes, locked
from dit_moe.files import require_writable
from dit_moe.formatting import significant
from dit_moe.pictures import save_png
from dit_moe.progress import images_bar

# Latents are kept as the network makes them, whatever normalisation training will choose.
RAW: dict[str, Any] = {
    "normalization": "model",
    "shift": None,
    "scale": None,
    "statistics": None,
    "statistics_sha256": None,
}


class Sections(Protocol):
    """An experiment, as far as it says what to encode, by which autoencoder, and where the latents go."""

    @property
    def encode(self) -> EncodeConfig | None: ...
    @property
    def first_stage(self) -> Any: ...
    @property
    def data(self) -> Any: ...


def encode(experiment: Sections, split: str = "train", skip_broken: bool = False) -> dict[str, Any]:
    """Make the latents of an experiment, or what is missing of them; returns a summary. All processes take part."""
    encoder = _open_encoder(experiment, split)
    with locked(encoder.folder):
        missing, processes = encoder.missing(skip_broken), join_processes().num_processes
        total, start = encoder.shards.rows_in(missing), time.perf_counter()
        with images_bar("encoding", total) as advance:  # the main process takes the others to be as quick as itself
            manifest = encoder.run(skip_broken, lambda count: advance(count * processes))
    seconds = time.perf_counter() - start
    return _summary(encoder.folder, manifest) | {
        "shards_made": len(missing),
        "seconds": round(seconds, 3),
        "images_per_s": significant(total / seconds),
    }


def verify_latents(experiment: Sections, split: str) -> dict[str, Any]:
    """Check the latents of an experiment and draw verify.png; returns a summary.

    ConfigError if the experiment would encode other images, or in another way.
    """
    encoder = _open_encoder(experiment, split)
    folder = encoder.folder
    found = read_manifest(folder)
    encoder.require_same(found.encoding)
    with images_bar("verifying", len(found)) as advance:
        manifest = check_shards(folder, advance)
    pairs = reconstruct(folder, manifest, encoder.stage, encoder.dataset)
    save_png(reconstruction_grid(*pairs), folder / "verify.png")
    error = (pairs[0].double() - pairs[1].double()).abs().mean().item()
    return _summary(folder, manifest) | {
        "verified": True,
        "mean_absolute_error": significant(error),  # of the pictures, in grey levels of 0..255
        "picture": str(folder / "verify.png"),
    }


def _open_encoder(experiment: Sections, split: str) -> Encoder:
    """The encoder of a split's images. ConfigError if a section is missing or does not fit."""
    data, first_stage, config = experiment.data, experiment.first_stage, experiment.encode
    if config is None:
        wanted = "say which images to encode, for instance encode.images.name=image_folder"
        raise ConfigError("encode", f" is missing; {wanted}")
    if not isinstance(data, LatentsConfig):
        name = DATASETS.name_of(data)
        raise ConfigError("data.name", f"={name} takes no encoded latents; use data: {{name: latents, path: FOLDER}}")
    if not isinstance(first_stage, AutoencoderConfig):
        raise ConfigError("first_stage", " names no autoencoder; add first_stage: {name: autoencoder, model: …}")
    folder = data.path if split == "train" else data.heldout
    if folder is None:
        raise ConfigError("data.heldout", " is missing; name the folder that the held-out latents go into")
    if data.heldout is not None and os.path.realpath(data.heldout) == os.path.realpath(data.path):
        problem = f"={data.heldout} is data.path, the folder of the latents that are trained on"
        raise ConfigError("data.heldout", f"{problem}; name another folder, or null")
    with section("encode.images"):
        images: Dataset = DATASETS.build(config.images, split)
        _require_held_out(config.images, images, split)
    stage: Autoencoder = FIRST_STAGES.build(replace(first_stage, **RAW))
    stage.latent_shape(images.image_shape)
    stage.to(join_processes().device).load()
    require_writable(Path(folder))
    return Encoder(config, stage, images, Path(folder))


def _require_held_out(config: Any, images: Dataset, split: str) -> None:
    """ConfigError if held-out images are trained on, whichever of both splits `images` are.

    Images that cannot be opened are none, or gone since they were encoded.
    """
    if split == "train" and not names_heldout(config):
        return
    if getattr(config, "skip_broken", False):  # all would be decoded
        config = replace(config, skip_broken=False)
    try:
        other: Dataset = DATASETS.build(config, "heldout" if split == "train" else "train")
    except ValueError:
        return
    require_held_out(*((images, other) if split == "train" else (other, images)))


def _summary(folder: Path, manifest: Manifest) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "images": len(manifest),
        "skipped": len(manifest.skipped),
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "latents": manifest.describe(),
        "mean": manifest.mean,
        "std": manifest.std,
    }


def check_shards(folder: Path, on_images: Callable[[int], object] = lambda count: None) -> Manifest:
    """Compare every shard with its hash, and the statistics of all with the manifest, which says both.

    `on_images(n)` with every shard. ValueError names the first shard that was changed, and how many others were.
    """
    manifest = read_manifest(folder)
    changed, parts = [], []
    for shard in manifest.shards:
        content = (folder / SHARDS / shard.file).read_bytes()
        on_images(shard.count)
        if hashlib.sha256(content).hexdigest() == shard.sha256:
            parts.append(channel_statistics(load(content)["moments"]))
        else:
            changed.append(shard.file)
    if changed:
        more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        remedy = "delete these shards and run `dit-moe encode` again, which makes them anew"
        raise ValueError(f"{folder}: {changed[0]} was changed after it was written{more}; {remedy}")
    values = len(manifest) * (2 if manifest.flips else 1) * math.prod(manifest.latent_shape[1:])
    for name, found in zip(("mean", "std"), mean_and_std(parts, values), strict=True):
        stated = getattr(manifest, name)
        if not np.allclose(found, stated, rtol=1e-6, atol=1e-7):  # other machines add in another order
            problem = f"the {name} per channel is {found.tolist()}, the manifest says {list(stated)}"
            remedy = "restore the manifest or delete it and run `dit-moe encode` again"
            raise ValueError(f"{folder}: {problem}; {remedy}")
    return manifest


@torch.no_grad()
def reconstruct(folder: Path, manifest: Manifest, stage: FirstStage, images: Dataset, count: int = SHOWN) -> Tensor:
    """[2, P, C, H, W] uint8: `count` images spread evenly over the data set, and what their latents decode to."""
    places = spread(len(manifest), count)
    index = np.delete(np.arange(len(images)), [image for image, _ in manifest.skipped])[places]
    rows = LatentShards(LatentsConfig(path=str(folder), flip=False), "train").__getitems__(places)
    device = next(stage.buffers()).device
    mean = stage.moments_of({"moments": rows["moments"].to(device)}).mean
    originals = images.__getitems__(index.tolist())["images"]
    return torch.stack([originals, torch.cat([stage.decode(one[None]).cpu() for one in mean])])
