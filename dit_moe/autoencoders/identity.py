"""Pixel space as a first stage: latents are the pixels in [−1, 1]."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dit_moe.autoencoders.base import FIRST_STAGES, FirstStage, Moments, Shape
from dit_moe.autoencoders.pixels import from_uint8, to_uint8


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
