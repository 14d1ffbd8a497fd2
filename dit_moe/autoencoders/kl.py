"""Our own AutoencoderKL: its shape, the network as the trainer calls it, its loss, and its export.

It is exported in diffusers' layout, with the shift and scale that give its latents unit size.

Source: Rombach et al., High-resolution image synthesis with latent diffusion models, 2022 (without its discriminator).
"""

# B batch, C channels, H height, W width (of images or of latents, as the name says)

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from dit_moe.autoencoders.base import FirstStage, Moments, from_uint8
from dit_moe.autoencoders.lpips import LPIPS
from dit_moe.autoencoders.reconstructions import psnr, spread
from dit_moe.autoencoders.statistics import channel_statistics
from dit_moe.config import ConfigError, require
from dit_moe.data import Dataset
from dit_moe.files import require_own, require_writable, write_atomically
from dit_moe.randomness import BatchRandom

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"  # as diffusers calls them
MADE_BY = "made_by.json"  # ours: what an autoencoder is and what made it
MOST_IMAGES, BATCH = 10_000, 64  # that errors and statistics are measured on


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

    def build(self, image_shape: tuple[int, int, int]) -> Any:
        """A diffusers AutoencoderKL with random weights. ConfigError if it cannot halve such images so often."""
        from diffusers import AutoencoderKL  # seconds that no other command needs to spend

        channels, height, width = image_shape
        levels = len(self.block_out_channels)
        downsampling = 2 ** (levels - 1)  # pixels of an image per latent, along each side
        if height % downsampling or width % downsampling:
            shown, wanted = list(self.block_out_channels), f"multiples of {downsampling} pixels"
            problem = f"={shown} takes images with sides of {wanted}, not {height}×{width}; drop an entry"
            raise ConfigError("block_out_channels", problem)
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


# ----------------------------------------------------------------------------------------------------------- the export


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
    return {"images": count, "mae": absolute / values, "psnr": psnr(squared / values)}


def _batches(images: Dataset) -> Iterator[Tensor]:
    """uint8 [B, C, H, W]: all images, or `MOST_IMAGES` spread evenly over them."""
    rows = spread(len(images), MOST_IMAGES)
    for start in range(0, len(rows), BATCH):
        yield images.__getitems__(rows[start : start + BATCH])["images"]
