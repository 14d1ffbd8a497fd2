"""Where the tokens of a square grid are: fixed vectors added to them, or angles that queries and keys are turned by."""

# S tokens = side·side, D width, Q width of a head

from __future__ import annotations

import torch
from torch import Tensor


def sincos_position_embedding(width: int, side: int) -> Tensor:
    """Fixed 2-D position embedding [side·side, width]; the first half encodes the column, each half is [sin | cos].

    Computed in float64, as DiT's is.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis_SD = torch.cat([angles.sin(), angles.cos()], dim=-1)
    columns, rows = axis_SD.repeat(side, 1), axis_SD.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=-1).float()


def rotary_position_embedding(head_dim: int, side: int, grid: int | None = None) -> Tensor:
    """2-D rotary embedding (EVA-02, LightningDiT) as [side·side, 2·Q], sines and then cosines, fp32.

    The first half of a head encodes the row, the second the column. Of each, pair (2j, 2j + 1) turns by
    position · 10000^(−4j/Q).

    Args:
        head_dim: Q, a multiple of 4.
        side: tokens a row.
        grid: positions are spread over a row of so many, the one trained on; None: they count tokens.
    """
    from timm.layers import build_rotary_pos_embed  # here, as importing timm takes seconds

    trained = None if grid is None else [grid, grid]
    return torch.cat(build_rotary_pos_embed([side, side], dim=head_dim, in_pixels=False, ref_feat_shape=trained), -1)
