"""The coefficient of a loss that makes routing sparser, steered such that the target stays (ReMoE)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MOST_DAMPED = 4.0  # at most a factor of e⁴


class Coefficient(nn.Module):
    """Of a loss, relative to its start: grows by a factor after each step with more experts than the target.

    It falls by that factor after a step with fewer, but not below its start, where it has no effect already. Weights go
    on moving after it has turned back, so by itself it swings around the target. `damping` adds to the logarithm of
    what is used, for the next step alone, so many times the error as a share of the target.
    """

    integral: Tensor
    value: Tensor

    def __init__(self, growth: float, damping: float) -> None:
        super().__init__()
        self.growth, self.damping = growth, damping
        self.register_buffer("integral", torch.tensor(1.0))  # what is published
        self.register_buffer("value", torch.tensor(1.0))  # what the loss is multiplied by

    def step(self, active: Tensor, target: float) -> None:
        """After a step with `active` experts a token; NaN, the mean of no tokens, moves nothing."""
        error = active / target - 1
        self.integral.mul_(self.growth ** error.sign().nan_to_num()).clamp_(min=1)
        damped = self.integral * (self.damping * error).clamp(-MOST_DAMPED, MOST_DAMPED).exp()
        self.value.copy_(torch.where(error.isnan(), self.value, damped))
