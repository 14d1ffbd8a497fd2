"""What a run will hold in the memory of each GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from dit_moe.config import ConfigError
from dit_moe.costs import decoder, dit
from dit_moe.costs.gpus import GIB, GPUS, ROOM, precision_on
from dit_moe.costs.saved import FP32, Network
from dit_moe.models import DiTConfig, LMConfig
from dit_moe.models.base import TransformerConfig
from dit_moe.rounding import rounded

# A new family: a file with a function like these.
NETWORKS: dict[type, Callable[[Any, int, float], Network]] = {DiTConfig: dit.network, LMConfig: decoder.network}

# A controller follows its router a step behind. About the largest mean of a step that the start of training showed, in
# targets: docs/controller.md.
PEAK = 1.5


def memory(experiment: Any, precision: str, gpus: int, rows: int, active: float | None = None) -> dict[str, float]:
    """Bytes on each GPU by what they hold, with `rows` in a forward pass and `active` experts a token or the target.

    Their sum is an upper bound: gradients come as activations go. Left out are, of an image model, the loss's own
    tensors, a few times the latents', and a first stage that encodes on the fly.
    """
    model, train, e = experiment.model, experiment.train, _bytes(precision)
    whole = FP32 * model.footprint().total_params
    sharded = gpus > 1 and train.parallel == "fsdp2"
    part = whole / gpus if sharded else whole
    several = rows * gpus < train.batch_size
    held = {
        "weights": part,
        "gradients": whole if several and sharded else part,  # micro-batches add up whole ones
        "AdamW": 2 * part,
        "EMA": part,
    }
    if sharded:
        tables = FP32 * network(model, e).tables
        held["gathered blocks"] = 3 * (whole - tables) / model.depth  # weights of this and the next, gradients of one
        if tables:
            held["gathered tables"] = 2 * tables  # they stay for the whole pass, and so do their gradients
    held["activations"] = activation_bytes(model, rows, precision, active=active)
    if isinstance(model, LMConfig):
        held["logits"] = decoder.logits_bytes(rows * model.tokens * model.need("vocab_size"), e)
    return held


def network(model: TransformerConfig, e: int, active: float | None = None) -> Network:
    """What autograd keeps of a model that multiplies numbers of `e` bytes, at `active` experts, or the target's."""
    target = 0.0 if model.moe is None else model.moe.target
    return NETWORKS[type(model)](model, e, target if active is None else active)


def peak_active(model: TransformerConfig) -> float | None:
    """The most active experts a token, on average over a step, that training is to be ready for; None: the target."""
    moe = model.moe
    if moe is None or not moe.router.controlled:
        return None
    return min(PEAK * moe.target, moe.router.max_experts or moe.experts)


def _bytes(precision: str) -> int:
    return 2 if precision == "bf16" else FP32


def activation_bytes(
    model: TransformerConfig, rows: int, precision: str, recompute: bool | None = None, active: float | None = None
) -> float:
    """What the backward pass of `rows` needs of the forward pass.

    Args:
        recompute: None is what the model says.
        active: experts a token, on average; None is the target.
    """
    e, recompute = _bytes(precision), model.recompute if recompute is None else recompute
    return network(model, e, active).bytes(rows * model.tokens, rows, e, recompute)


def memory_lines(experiment: Any, name: str, gpus: int, unit: str) -> Iterator[str]:
    """On the GPU `name`; a row is one of `unit`. ConfigError unless the GPUs can share the batch equally."""
    train, gpu = experiment.train, GPUS[name]
    precision = precision_on(name, train.mixed_precision)
    if train.batch_size % gpus:
        problem = f"={train.batch_size} cannot be shared equally by {gpus} GPUs; use a multiple"
        raise ConfigError("train.batch_size", problem)
    share = train.batch_size // gpus
    rows = min(train.micro_batch or share, share)
    held = memory(experiment, precision, gpus, rows)
    parts = ", ".join(f"{part} {rounded(size / GIB, 1)}" for part, size in held.items())
    total = sum(held.values())
    in_all = rounded(total / GIB, 1)
    yield f"memory per GPU    {in_all} GiB with {rows} {unit} at a time ({name}: {gpu.memory}): {parts}"
    other = not experiment.model.recompute
    instead = activation_bytes(experiment.model, rows, precision, recompute=other) / GIB
    yield f"                  with model.recompute={str(other).lower()}: activations {rounded(instead, 1)}"
    peak = peak_active(experiment.model)
    if peak is not None:
        total = sum(memory(experiment, precision, gpus, rows, peak).values())
        share = f"{peak:g} active experts where the target is {experiment.model.moe.target:g}"
        yield f"                  {rounded(total / GIB, 1)} GiB at {share}, a peak that early training may have"
    if total > ROOM * gpu.memory * GIB:
        tried = _remedies(experiment, precision, gpus, rows, ROOM * gpu.memory * GIB)
        advice = "; or ".join(tried) or "no setting helps; use more GPUs with train.parallel=fsdp2, or larger ones"
        yield f"warning: more than {ROOM:.0%} of that memory. What would fit: {advice}"


def _remedies(experiment: Any, precision: str, gpus: int, rows: int, limit: float) -> Iterator[str]:
    """Overrides with which the experiment stays below `limit` bytes on each GPU, the cheapest first."""
    for parallel in dict.fromkeys([experiment.train.parallel, "fsdp2" if gpus > 1 else experiment.train.parallel]):
        for recompute in dict.fromkeys([experiment.model.recompute, True]):
            changed = replace(
                experiment,
                model=replace(experiment.model, recompute=recompute),
                train=replace(experiment.train, parallel=parallel),
            )
            parts = (n for n in range(rows, 0, -1) if rows % n == 0)
            peak = peak_active(changed.model)
            fitting = next((n for n in parts if sum(memory(changed, precision, gpus, n, peak).values()) <= limit), 0)
            changes = {
                "train.micro_batch": (str(fitting), fitting < rows),
                "model.recompute": ("true", recompute != experiment.model.recompute),
                "train.parallel": (parallel, parallel != experiment.train.parallel),
            }
            if fitting:
                yield " ".join(f"{key}={value}" for key, (value, differs) in changes.items() if differs)
