"""Latents of an experiment's images: made, or what is missing of them, and verified."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_moe.autoencoders import FIRST_STAGES
from dit_moe.autoencoders.autoencoder import Autoencoder, AutoencoderConfig
from dit_moe.autoencoders.encode import Encoder
from dit_moe.autoencoders.verify import reconstruct, verify
from dit_moe.config import ConfigError
from dit_moe.data import DATASETS, Dataset
from dit_moe.data.latents import LatentsConfig
from dit_moe.data.manifest import Manifest, read_manifest
from dit_moe.distributed import join_processes, locked
from dit_moe.experiments.image import Experiment, open_data
from dit_moe.files import require_writable
from dit_moe.pictures import image_grid, save_png
from dit_moe.progress import images_bar
from dit_moe.rounding import significant

PICTURES = 8  # images that verify.png shows


def encode(experiment: Experiment, split: str = "train", skip_broken: bool = False) -> dict[str, Any]:
    """Make the latents of an experiment, or what is missing of them; returns a summary."""
    folder, stage, images = _parts(experiment, split)
    assert experiment.encode is not None
    with locked(folder):
        encoder = Encoder(experiment.encode, stage, images, folder)
        missing, processes = encoder.missing(skip_broken), join_processes().num_processes
        total, start = encoder.shards.rows_in(missing), time.perf_counter()
        with images_bar("encoding", total) as advance:  # the main process takes the others to be as quick as itself
            manifest = encoder.run(skip_broken, lambda count: advance(count * processes))
    seconds = time.perf_counter() - start
    return _summary(folder, manifest) | {
        "shards_made": len(missing),
        "seconds": round(seconds, 3),
        "images_per_s": significant(total / seconds),
    }


def verify_latents(experiment: Experiment, split: str) -> dict[str, Any]:
    """Verify the latents of an experiment and draw verify.png; returns a summary.

    ConfigError if the experiment would encode other images, or in another way.
    """
    folder, stage, images = _parts(experiment, split)
    assert experiment.encode is not None
    found = read_manifest(folder)
    Encoder(experiment.encode, stage, images, folder).require_same(found.encoding)
    with images_bar("verifying", len(found)) as advance:
        manifest = verify(folder, advance)
    pairs = reconstruct(folder, manifest, stage, images, PICTURES)
    save_png(image_grid(pairs.flatten(0, 1), columns=pairs.shape[1]), folder / "verify.png")
    error = (pairs[0].double() - pairs[1].double()).abs().mean().item()
    return _summary(folder, manifest) | {
        "verified": True,
        "mean_absolute_error": significant(error),  # of the pictures, in grey levels of 0..255
        "picture": str(folder / "verify.png"),
    }


def _parts(experiment: Experiment, split: str) -> tuple[Path, Autoencoder, Dataset]:
    """Where the latents go, what makes them, and of what."""
    data, first_stage = experiment.data, experiment.first_stage
    if experiment.encode is None:
        raise ConfigError(
            "encode", " is missing; say which images to encode, for instance encode.images.name=image_folder"
        )
    if not isinstance(data, LatentsConfig):
        name = DATASETS.name_of(data)
        raise ConfigError("data.name", f"={name} takes no encoded latents; use data: {{name: latents, path: FOLDER}}")
    if not isinstance(first_stage, AutoencoderConfig):
        raise ConfigError("first_stage", " names no autoencoder; add first_stage: {name: autoencoder, model: …}")
    folder = data.path if split == "train" else data.heldout
    if folder is None:
        raise ConfigError("data.heldout", " is missing; name the folder that the held-out latents go into")
    images = open_data(experiment.encode.images, split, "encode.images")
    # Latents are kept as the network makes them, whatever normalisation training will choose.
    stage: Autoencoder = FIRST_STAGES.build(replace(first_stage, normalization="model", shift=None, scale=None))
    stage.latent_shape(images.image_shape)
    stage.to(join_processes().device).load()
    require_writable(Path(folder))
    return Path(folder), stage, images


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
