"""The exponential moving average of a model's weights: what sampling and evaluation use."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dit_moe.training.sharding import local


class EMA:
    """An averaged copy, `module`, in evaluation mode: parameters averaged in fp32, buffers copied.

    Buffers must follow, not average: they hold the thresholds of the routers that the averaged weights go with. When
    the model is sharded, the copy is to be sharded alike.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        for parameter in self.module.parameters():
            parameter.data = parameter.data.float()  # not module.float(): float64 buffers stay what they are

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Take in the weights of `model` after so many earlier updates.

        The decay grows with them, min(decay, (1 + n) / (10 + n)), so that a short run's average has forgotten its
        random start: it looks back over about a ninth of what was trained so far, at most 1/(1 − decay) steps.
        """
        decay = min(self.decay, (1 + updates) / (10 + updates))
        averages = [local(average) for average in self.module.parameters()]
        get_ema_multi_avg_fn(decay)(averages, [local(p).detach().float() for p in model.parameters()], updates)
        for average, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
