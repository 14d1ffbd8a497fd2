"""What a Diffusion Transformer is told of a sample beside its tokens: embeddings of the timestep and of the class."""

# B batch, D width

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

FREQUENCIES = 256  # width of the sinusoidal timestep embedding


class TimestepEmbedder(nn.Module):
    """Timestep [B] → conditioning [B, D]: sinusoids of 128 frequencies as [cos | sin], then an MLP."""

    def __init__(self, width: int, freq_shift: int = 0) -> None:
        super().__init__()
        self.freq_shift = freq_shift
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        return self.mlp(self.sinusoids(t_B).to(next(self.parameters()).dtype))

    def sinusoids(self, t_B: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        exponents = torch.arange(half, device=t_B.device, dtype=torch.float32)
        frequencies = torch.exp(-math.log(10000) * exponents / (half - self.freq_shift))
        angles = t_B.float()[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class LabelEmbedder(nn.Module):
    """Class labels [B] → conditioning [B, D]; index `num_classes` is the null class of guidance."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y_B: Tensor) -> Tensor:
        return self.embedding_table(y_B)
