"""A trained AutoencoderKL → a folder in diffusers' layout whose latents have unit size; what reconstructions lose."""

# n images measured, B batch, C channels, H height, W width

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from dit_moe.autoencoders.base import FirstStage
from dit_moe.autoencoders.encode import channel_statistics
from dit_moe.autoencoders.pixels import from_uint8
from dit_moe.data import Dataset
from dit_moe.files import require_own, require_writable, write_atomically

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"  # as diffusers calls them
MADE_BY = "made_by.json"  # ours: what an autoencoder is and what made it
MOST_IMAGES, BATCH = 10_000, 64


def export(autoencoder: Any, images: Dataset, folder: Path) -> None:
    """Write the diffusers AutoencoderKL `autoencoder` into `folder`.

    Its shift and scale become those that give the latents of `images` mean 0 and standard deviation 1, over all
    channels. Nothing loads a folder without its config.json, which goes first and comes last. ValueError if the folder
    cannot be written, or holds an autoencoder that was not exported by us.
    """
    require_own_export(folder)
    mean, std = latent_statistics(autoencoder, images)
    autoencoder.register_to_config(shift_factor=mean, scaling_factor=1 / std)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in autoencoder.state_dict().items()}
    require_writable(folder)
    write_atomically(folder / MADE_BY, "{}\n")  # before the rest, which is then known as ours
    (folder / CONFIG).unlink(missing_ok=True)
    write_atomically(folder / WEIGHTS, save(weights, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG, autoencoder.to_json_string())


def require_own_export(folder: Path) -> None:
    """ValueError if an autoencoder from elsewhere lies in `folder`."""
    require_own(folder, (CONFIG, WEIGHTS), (folder / MADE_BY).is_file())


@torch.no_grad()
def latent_statistics(autoencoder: Any, images: Dataset) -> tuple[float, float]:
    """Mean and standard deviation of raw latents as training draws them: the spread of the posteriors counts."""
    total, square, count = 0.0, 0.0, 0
    for batch in _batches(images):
        posterior = autoencoder.encode(from_uint8(batch.to(autoencoder.device))).latent_dist
        moments = torch.stack([posterior.mean, posterior.std], 1)[:, None].cpu()
        sums, squares = channel_statistics(moments)
        total, square, count = total + sums.sum(), square + squares.sum(), count + posterior.mean.numel()
    mean = total / count
    return float(mean), math.sqrt(square / count - mean**2)


def reconstruction_errors(stage: FirstStage, images: Dataset) -> dict[str, float | int | None]:
    """Mean absolute error in grey levels of 0..255 and PSNR in dB over `images`, encoded and decoded without noise.

    The PSNR is that of the mean squared error of all pixels; null if nothing is lost.
    """
    absolute, squared, values, count = 0.0, 0.0, 0, 0
    device = next(stage.buffers(), torch.empty(0)).device
    for batch in _batches(images):
        difference = stage.decode(stage.encode(batch.to(device)).mean).cpu().double() - batch.double()
        absolute, squared = absolute + difference.abs().sum().item(), squared + difference.square().sum().item()
        values, count = values + batch.numel(), count + len(batch)
    psnr = 10 * math.log10(255**2 * values / squared) if squared else None
    return {"images": count, "mae": absolute / values, "psnr": psnr}


def _batches(images: Dataset) -> Iterator[Tensor]:
    """uint8 [B, C, H, W]: all images, or `MOST_IMAGES` spread evenly over them."""
    n = min(len(images), MOST_IMAGES)
    rows = np.linspace(0, len(images) - 1, n).round().astype(int).tolist()
    for start in range(0, n, BATCH):
        yield images.__getitems__(rows[start : start + BATCH])["images"]
