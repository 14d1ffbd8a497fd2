"""What a first stage is: the fixed map between images and the space the diffusion model lives in; pixels as latents.

Scale and shift of latents exist inside first stages only; whoever trains or samples sees latents of about unit size.
"""

# B batch, M moments, C channels, H height, W width (of images or of latents, as the name says)

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dit_moe.registry import Registry

FIRST_STAGES = Registry("first stage")
Shape = tuple[int, int, int]  # (C, H, W)


class Moments(NamedTuple):
    """What an encoder says about latents: their mean and, unless it is deterministic, std; both [B, C, H, W]."""

    mean: Tensor
    std: Tensor | None = None

    def sample(self, noise_like: Callable[[Tensor], Tensor]) -> Tensor:
        """One draw, mean + std·noise.

        Args:
            noise_like: returns standard normal noise of its argument's shape; not called if there is no std, so that
                a deterministic stage consumes no random numbers.
        """
        return self.mean if self.std is None else self.mean + self.std * noise_like(self.mean)


class FirstStage(nn.Module, ABC):
    """Images ⇄ latents. Works on the device its input is on; one with weights is moved by ``.to(device)``."""

    config: Any

    @abstractmethod
    def latent_shape(self, image_shape: Shape) -> Shape:
        """Shape of the latents of images of this shape. ValueError if the stage cannot take such images."""

    @abstractmethod
    def encode(self, images_BCHW: Tensor) -> Moments:
        """uint8 images → float32 moments of the latents, scaled and shifted. ValueError for another dtype."""

    @abstractmethod
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Latents → uint8 images by the rule of `to_uint8`. ValueError for NaN or infinity."""

    def normalize(self, moments: Moments) -> Moments:
        """Moments as an encoder makes them and shards keep them → scaled and shifted, as `encode` returns them."""
        return moments

    def load(self) -> None:
        """Read the weights now rather than at first use, so that what is wrong with them shows before the work."""

    def resolved(self) -> Any:
        """The config with everything spelt out that tells this latent space from others, for the checkpoint."""
        return self.config

    def moments_of(self, rows: Mapping[str, Tensor]) -> Moments:
        """Normalised moments of a data set's rows, be they images or moments [B, M, C, H, W] that were encoded before.

        M is 2, mean and std, or 1 from a deterministic encoder.
        """
        if "images" in rows:
            return self.encode(rows["images"])
        return self.normalize(Moments(*rows["moments"].float().unbind(1)))


@dataclass(frozen=True, kw_only=True)
class IdentityConfig:
    """The identity has no options."""


@FIRST_STAGES.register("identity", IdentityConfig)
class Identity(FirstStage):
    """x/127.5 − 1 and back, without loss: decode(encode(images).mean) equals the images."""

    def __init__(self, config: IdentityConfig) -> None:
        super().__init__()
        self.config = config

    def latent_shape(self, image_shape: Shape) -> Shape:
        return image_shape

    def encode(self, images_BCHW: Tensor) -> Moments:
        return Moments(from_uint8(images_BCHW))

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return to_uint8(latents_BCHW)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 0..255 → float32 in [−1, 1], x/127.5 − 1. Raises ValueError for any other dtype."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images have dtype {images.dtype}; first stages take uint8 0..255")
    return images.float() / 127.5 - 1


def to_uint8(images_BCHW: Tensor) -> Tensor:
    """Floats, nominally in [−1, 1], → uint8: clamp(127.5·x + 128, 0, 255), truncated (ADM, references.md §1).

    Truncation after +128 is rounding of 127.5·(x + 1), so this inverts `from_uint8` exactly. NaN and infinities raise
    ValueError: cast to uint8 they would silently become black or white.
    """
    finite_B = images_BCHW.isfinite().flatten(1).all(1)
    if not finite_B.all():
        bad = (~finite_B).nonzero().flatten().tolist()
        raise ValueError(
            f"{len(bad)} of {len(finite_B)} images hold NaN or infinity, the first is number {bad[0]} of the batch; "
            "the network that made them diverged, use an earlier checkpoint or sample in float32"
        )
    return (127.5 * images_BCHW.float() + 128).clamp(0, 255).to(torch.uint8)
