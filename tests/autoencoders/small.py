"""Autoencoders of a few thousand weights, made on the spot, and images for them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

SMALL = {
    "AutoencoderKL": {
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8),
        "num_encoder_blocks": (1, 1, 1),
        "num_decoder_blocks": (1, 1, 1),
    },
    "AutoencoderDC": {
        "latent_channels": 8,
        "encoder_block_out_channels": (8, 8, 16),
        "decoder_block_out_channels": (8, 8, 16),
        "encoder_layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1),
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "encoder_qkv_multiscales": ((), (), ()),
        "decoder_qkv_multiscales": ((), (), ()),
        "attention_head_dim": 8,
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "scaling_factor": 0.4,
    },
}


def make(folder: Path, kind: str = "AutoencoderKL", seed: int = 0, **options: object) -> str:
    """An autoencoder with random weights in diffusers' layout, 4 times smaller latents; returns the folder."""
    import diffusers

    torch.manual_seed(seed)
    getattr(diffusers, kind)(**SMALL[kind] | options).save_pretrained(folder)
    return str(folder)


def images(count: int = 3, channels: int = 3, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
