"""Images beside what an autoencoder makes of them, in numbers and as a picture."""

# P pictures, C channels, H height, W width

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit_moe.autoencoders.base import FirstStage
from dit_moe.data import Dataset
from dit_moe.pictures import image_grid

SHOWN = 8  # images in a picture


def psnr(mean_squared_error: float) -> float | None:
    """In dB, of an error in grey levels of 0..255; None if nothing is lost."""
    return 10 * math.log10(255**2 / mean_squared_error) if mean_squared_error else None


def spread(count: int, most: int = SHOWN) -> list[int]:
    """At most so many places, evenly over `count`."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


@torch.no_grad()
def reconstruct(stage: FirstStage, images_PCHW: Tensor) -> Tensor:
    """uint8 images → what their mean latents decode to, uint8 on the CPU."""
    device = next(stage.buffers()).device
    return stage.decode(stage.encode(images_PCHW.to(device)).mean).cpu()


def shown_images(images: Dataset) -> Tensor:
    """uint8 [P, C, H, W]: a few, spread evenly over the data set."""
    return images.__getitems__(spread(len(images)))["images"]


def reconstruction_grid(originals_PCHW: Tensor, decoded_PCHW: Tensor) -> Image.Image:
    """uint8 originals in one row, and in another what they were decoded to, with the PSNR of those shown."""
    lost = psnr((originals_PCHW.double() - decoded_PCHW.double()).square().mean().item())
    captions = ("original", "decoded, " + ("no loss" if lost is None else f"{lost:.1f} dB PSNR"))
    return image_grid(torch.cat([originals_PCHW, decoded_PCHW]), len(originals_PCHW), captions)
