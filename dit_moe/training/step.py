"""One training step: what the trainer repeats and benchmarks time, with its optimizer and average of the weights.

Forward and backward of every micro-batch → one read of all numbers, agreed on by all processes → stop if any is not
finite → clip → AdamW → routers' controllers → EMA.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dit_moe import checkpoint
from dit_moe.models.compilation import compile_blocks
from dit_moe.moe import calibrate, counted_active, counted_dropped, update_routers
from dit_moe.randomness import BatchRandom
from dit_moe.training.config import TrainConfig
from dit_moe.training.devices import accumulating, local, place, wrap
from dit_moe.training.profile import Phase, untimed

Batch = dict[str, Tensor]
Objective = Callable[[Callable[..., Tensor], Batch, BatchRandom], dict[str, Tensor]]
ACTIVE_PEAK = "active_peak"  # of the log: the largest mean of active experts that a step had
DROPPED = "dropped"  # of the log: mean experts of a token that the capacity had no room for


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows of a step's batch that go through the network at once."""

    batch: Batch
    random: Callable[[], BatchRandom]  # the draws for these rows in this step, from their beginning
    share: float  # of this process's rows


class NotFinite(ArithmeticError):
    """Numbers of a step are not finite; the weights were not touched."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self.values = {name: value for name, value in values.items() if not math.isfinite(value)}
        super().__init__(", ".join(f"{name}={value}" for name, value in self.values.items()))


class TrainingStep:
    """A model, its optimizer and its average, and the step that trains them.

    Args:
        model: on the CPU; called as ``model(…, return_aux=True) -> (output, {name: scalar})``, with
            ``model.aux_weights``, and ``model.sharding_units`` for fsdp2.
        objective: ``(predict, batch, random) -> {"loss": scalar, …}``; `predict` is the model without its aux terms.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, model: nn.Module, objective: Objective) -> None:
        self.config, self.accelerator, self.objective = config, accelerator, objective
        self.model = model.train()
        self.aux_weights: Mapping[str, float] = model.aux_weights  # type: ignore[assignment]
        self.ema = EMA(self.model, config.ema_decay)
        place(accelerator, self.ema.module, config, average=True)
        if config.compile:
            compile_blocks(self.model)
        place(accelerator, self.model, config)
        self.optimizer = build_optimizer(self.model, config)
        self.phase: Phase = untimed  # entered for each of `profile.PARTS`

    @cached_property
    def network(self) -> nn.Module:
        """The model as accelerate wraps it; from the first step on."""
        return wrap(self.accelerator, self.model)

    def __call__(
        self,
        step: int,
        micro_batches: Sequence[MicroBatch],
        *,
        meanwhile: Callable[[], Mapping[str, bool]] = dict,
        report: bool = False,
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Do step number `step`, counted from 0.

        Args:
            micro_batches: this process's.
            meanwhile: called while the device still works; returns flags, which are averaged over processes.
            report: whether to return the routers' numbers, for which the device is waited for.

        Returns the numbers of the step by name, averaged over the global batch, and those of the routers. Raises
        NotFinite, in all processes together.
        """
        sums = self._accumulate_gradients(micro_batches)
        with self.phase("data"):
            flags = meanwhile()
        with self.phase("optimizer"):
            values = self._update_weights(step, sums, flags)
        with self.phase("routers"):
            routers = update_routers(self.model, self._sum, report=report)
        with self.phase("average"):
            self.ema.update(self.model, step)
        return values, routers

    def _update_weights(self, step: int, sums: Mapping[str, Tensor], flags: Mapping[str, bool]) -> dict[str, float]:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = checkpoint.whole(torch.nn.utils.get_total_norm(gradients))
        counted = {ACTIVE_PEAK: counted_active(self.model), DROPPED: counted_dropped(self.model)}
        routed = {name: mean.to(norm.dtype) for name, mean in counted.items() if mean is not None}
        flagged = {name: torch.full_like(norm, float(flag)) for name, flag in flags.items()}
        values = self._mean({**sums, "grad_norm": norm, **routed, **flagged})
        if not (math.isfinite(values["total_loss"]) and math.isfinite(values["grad_norm"])):
            raise NotFinite(values)
        if self.config.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.grad_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return values

    def calibrate(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Start DTop-p routers at their target on the global batch that these are this process's part of."""

        def run() -> None:
            for micro_batch in micro_batches:
                with self.accelerator.autocast():
                    training_loss(self.model, self.objective, micro_batch.batch, micro_batch.random(), self.aux_weights)

        calibrate(self.model, run, reduce=self._sum)

    def _accumulate_gradients(self, micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
        """Backward of the mean loss; returns the loss terms, means over this process's rows."""
        sums: dict[str, Tensor] = {}
        for micro_batch in micro_batches:
            last = micro_batch is micro_batches[-1]
            with nullcontext() if last else accumulating(self.accelerator, self.network):
                with self.phase("forward"):
                    total, terms = training_loss(
                        self.network, self.objective, micro_batch.batch, micro_batch.random(), self.aux_weights
                    )
                with self.phase("backward"):
                    (total * micro_batch.share).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.float() * micro_batch.share
        return sums

    def _sum(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "sum")

    def _mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Means over processes. Waits for the device, after the routers have: each for its number of routed pairs."""
        reduced = self.accelerator.reduce(torch.stack(list(values.values())), "mean")
        return dict(zip(values, reduced.tolist(), strict=True))


class Predict:
    """A network without its auxiliary terms, as objectives call it; those of each call are kept in `calls`."""

    def __init__(self, network: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> None:
        self.network, self.calls = network, list[dict[str, Tensor]]()
        self.wants_target: bool = getattr(getattr(network, "module", network), "wants_target", False)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        output, aux = self.network(*args, return_aux=True, **kwargs)
        self.calls.append(aux)
        return output


def training_loss(
    network: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    objective: Objective,
    batch: Batch,
    random: BatchRandom,
    aux_weights: Mapping[str, float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Evaluate `objective` with `network` and add the auxiliary terms of its calls, weighted.

    Returns the total to differentiate, and every term by itself, detached and unweighted: the objective's under its
    own names ("loss" among them), the network's as "aux_<name>", averaged over the calls, and "total_loss".
    """
    predict = Predict(network)
    terms = objective(predict, batch, random)
    total = terms["loss"]
    for name in predict.calls[0]:
        term = torch.stack([aux[name] for aux in predict.calls]).mean()
        total = total + aux_weights[name] * term
        terms = terms | {f"aux_{name}": term}
    return total, {name: term.detach() for name, term in (terms | {"total_loss": total}).items()}


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
    """The inverse of `optimizer_state` after a step. Raises ValueError if `source` holds not just all of the state.

    A parameter that has had no gradient yet has none: the optimizer begins it with the first.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots = {p: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for p in parameters}
    begun = {i: p for i, p in enumerate(parameters) if any(f"{names[p]}.{slot}" in tensors for slot in slots[p])}
    wanted = {f"{names[p]}.{slot}": tensor for p in begun.values() for slot, tensor in slots[p].items()}
    checkpoint.require_fit(wanted, tensors, source)
    state = {
        i: {slot: checkpoint.part_of(tensors[f"{names[p]}.{slot}"], own).clone() for slot, own in slots[p].items()}
        for i, p in begun.items()
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
