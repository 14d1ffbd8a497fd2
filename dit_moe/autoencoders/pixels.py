"""The two pixel rules that every first stage shares: uint8 → [−1, 1] and back."""

from __future__ import annotations

import torch
from torch import Tensor


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
