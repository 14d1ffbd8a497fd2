"""AdamW, the learning rate of a step, and the exponential moving average (EMA) of the weights."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dit_moe import checkpoint
from dit_moe.training.config import TrainConfig
from dit_moe.training.devices import local


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters. Weight matrices decay, the experts' stacked ones too.

    Biases, norm scales and router scalars set a level, embeddings are looked up one row at a time: none of them is
    kept small by decay without harm.
    """
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()  # tied weights count once
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                matrix = parameter.ndim >= 2 and "bias" not in name and not isinstance(module, nn.Embedding)
                (decaying if matrix else others).append(parameter)
                seen.add(parameter)
    groups = [{"params": decaying, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    beta1, beta2 = config.betas
    return torch.optim.AdamW(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step `step`, counted from 0: linear warm-up, then constant or half a cosine."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state under "<parameter name>.<slot>"; its hyper-parameters follow from the config."""
    return {
        f"{name}.{slot}": value
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.AdamW, tensors: dict[str, Tensor], source: str | Path
) -> None:
    """The inverse of `optimizer_state` after a step. Raises ValueError if `source` holds not just all of the state."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots = {p: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for p in parameters}
    wanted = {f"{names[p]}.{slot}": tensor for p in parameters for slot, tensor in slots[p].items()}
    checkpoint.require_fit(wanted, tensors, source)
    state = {
        i: {slot: checkpoint.part_of(tensors[f"{names[p]}.{slot}"], own).clone() for slot, own in slots[p].items()}
        for i, p in enumerate(parameters)
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class EMA:
    """An averaged copy of a model, `module`, which sampling and evaluation use.

    It is in evaluation mode; parameters are averaged in fp32, buffers copied. Buffers are not averaged: they hold the
    thresholds of the routers that the averaged weights go with. When the model is sharded, the copy must be, too.
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
