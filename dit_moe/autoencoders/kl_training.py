"""Training an AutoencoderKL: its shape, the network as the trainer calls it, and its loss.

Source: Rombach et al., High-resolution image synthesis with latent diffusion models, 2022 (without its discriminator).
"""

# B batch, C channels, H height, W width (of images or of latents, as the name says)

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dit_moe.autoencoders.base import Moments
from dit_moe.autoencoders.lpips import LPIPS
from dit_moe.config import ConfigError, require
from dit_moe.randomness import BatchRandom


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """The shape of an AutoencoderKL. The defaults are Stable Diffusion's: 84 M parameters, 8 pixels per latent."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # every one but the last halves height and width
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    attention: bool = True  # in the middle, over all latents of an image

    def __post_init__(self) -> None:
        for name in ("layers_per_block", "latent_channels", "norm_num_groups"):
            require(getattr(self, name) >= 1, self, name, "must be at least 1")
        groups = self.norm_num_groups
        good = self.block_out_channels and all(each > 0 and each % groups == 0 for each in self.block_out_channels)
        require(bool(good), self, "block_out_channels", f"must be multiples of norm_num_groups={groups}")

    @property
    def downsampling(self) -> int:
        """Pixels of an image per latent, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def build(self, image_shape: tuple[int, int, int]) -> Any:
        """A diffusers AutoencoderKL with random weights. ConfigError if it cannot halve such images so often."""
        from diffusers import AutoencoderKL  # seconds that no other command needs to spend

        channels, height, width = image_shape
        if height % self.downsampling or width % self.downsampling:
            shown, wanted = list(self.block_out_channels), f"multiples of {self.downsampling} pixels"
            problem = f"={shown} takes images with sides of {wanted}, not {height}×{width}; drop an entry"
            raise ConfigError("block_out_channels", problem)
        levels = len(self.block_out_channels)
        return AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            latent_channels=self.latent_channels,
            norm_num_groups=self.norm_num_groups,
            mid_block_add_attention=self.attention,
            use_quant_conv=False,  # 1×1 convolutions beside others; SD3 and FLUX have dropped them
            use_post_quant_conv=False,
            sample_size=max(height, width),
        )


class KLNetwork(nn.Module):
    """An AutoencoderKL as the trainer calls it."""

    aux_weights: Mapping[str, float] = {}
    sharding_units: Sequence[nn.Module] = ()  # an autoencoder is small beside its activations: one unit

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder: Any = autoencoder

    def forward(
        self, images_BCHW: Tensor, random: BatchRandom, *, return_aux: bool = False
    ) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
        """Images in [−1, 1] → ((images decoded from one draw of their latents, mean and log variance of these), {})."""
        posterior = self.autoencoder.encode(images_BCHW).latent_dist
        latents = Moments(posterior.mean, posterior.std).sample(lambda like: random.normal(*like.shape[1:]))
        mean = posterior.mean.clone()  # it is a view, which fsdp2 warns of
        return (self.autoencoder.decode(latents).sample, mean, posterior.logvar), {}


@dataclass(frozen=True, kw_only=True)
class KLLossConfig:
    """reconstruction + kl_weight · KL + lpips_weight · LPIPS."""

    reconstruction: Literal["l1", "l2"] = "l1"  # mean over pixel values in [−1, 1]
    kl_weight: float = 1e-6  # of nats per pixel value: the literature's weight, where both terms are sums
    lpips_weight: float = 0.0
    lpips_folder: str | None = None  # where the weights of the LPIPS network are; see dit_moe/autoencoders/lpips.py

    def __post_init__(self) -> None:
        for name in ("kl_weight", "lpips_weight"):
            require(getattr(self, name) >= 0, self, name, "must be at least 0")
        given = self.lpips_weight == 0 or self.lpips_folder is not None
        require(given, self, "lpips_weight", "needs the network's weights; set lpips_folder, or lpips_weight=0")


class KLLoss:
    """The objective. ConfigError if the LPIPS network is asked for and its weights cannot be read."""

    def __init__(self, config: KLLossConfig) -> None:
        self.config = config
        self.lpips = LPIPS.load(config.lpips_folder) if config.lpips_weight and config.lpips_folder else None

    def __call__(self, predict: Callable[..., Any], batch: dict[str, Tensor], random: BatchRandom) -> dict[str, Tensor]:
        """For images in [−1, 1]: "loss", and unweighted "reconstruction", "kl" and, if it has a weight, "lpips"."""
        config, images = self.config, batch["images"]
        decoded, mean, logvar = (each.float() for each in predict(images, random))
        distance = F.l1_loss if config.reconstruction == "l1" else F.mse_loss
        terms = {"reconstruction": distance(decoded, images), "kl": kl_nats(mean, logvar) / images[0].numel()}
        loss = terms["reconstruction"] + config.kl_weight * terms["kl"]
        if self.lpips is not None:
            terms["lpips"] = self.lpips.to(images.device)(decoded, images).mean()
            loss = loss + config.lpips_weight * terms["lpips"]
        return {"loss": loss} | terms


def kl_nats(mean_BCHW: Tensor, logvar_BCHW: Tensor) -> Tensor:
    """KL divergence of N(mean, exp logvar) from N(0, 1), summed over an image's latents, mean over images."""
    return 0.5 * (mean_BCHW.square() + logvar_BCHW.exp() - 1 - logvar_BCHW).flatten(1).sum(1).mean()
