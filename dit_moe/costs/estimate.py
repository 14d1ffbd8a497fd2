"""FLOPs, time and the lines below a resolved config that say what it will cost."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from dit_moe import config
from dit_moe.autoencoders.autoencoder import AutoencoderConfig
from dit_moe.config import ConfigError
from dit_moe.costs.machine_memory import memory_of_machine
from dit_moe.costs.measure import flops_per_second
from dit_moe.costs.memory import activation_bytes, memory, peak_active
from dit_moe.data.latents import LatentsConfig
from dit_moe.diffusion import OBJECTIVES, SAMPLERS
from dit_moe.experiments.image import Experiment
from dit_moe.experiments.text import TextExperiment
from dit_moe.formatting import rounded, speed
from dit_moe.models.base import TransformerConfig
from dit_moe.registry import did_you_mean

GIB = 2**30
MFU = 0.35  # share of the peak that a step reaches when none is stated
ROOM = 0.9  # of a GPU's memory; the rest is the driver's, the allocator's gaps, and gradients on their way
TIME_UNITS = (("days", 86_400), ("hours", 3600), ("minutes", 60), ("seconds", 1))


@dataclass(frozen=True)
class GPU:
    """Peak dense FLOP/s, products of matrices accumulated in fp32, and GiB of memory."""

    bf16: float | None  # None: it has none, and trains in fp32
    fp32: float  # without TF32, as `distributed` sets it
    memory: int


GPUS = {  # NVIDIA's data sheets and, for the RTX cards, the appendices of the GA102 and Ada architecture white papers
    "V100": GPU(None, 15.7e12, 32),  # SXM2
    "A100": GPU(312e12, 19.5e12, 80),
    "L40S": GPU(362e12, 91.6e12, 48),
    "H100": GPU(989e12, 67e12, 80),  # SXM
    "H200": GPU(989e12, 67e12, 141),
    "B200": GPU(2250e12, 75e12, 180),  # HGX, of 192 on the chip
    "RTX4090": GPU(165e12, 82.6e12, 24),
    "RTX3090": GPU(71e12, 35.6e12, 24),
}


SLOWER = re.compile("Laptop|MIG|NVL|H100 PCIe")  # what shares a name with one of these, and is none
CPU = "cpu"  # in place of one of these
USUAL = "H100"  # where nothing says which


def of_this_machine(gpus: int = 1, mfu: float | None = None) -> str:
    """What an estimate is for where none is named: this machine's GPU, or its CPU, of which `describe` takes one alone.

    `USUAL` for a GPU that is not in the table, and where there is none for a number of them or a share of their peak.
    """
    if not torch.cuda.is_available():
        return CPU if gpus == 1 and mfu is None else USUAL
    return _gpu_here() or USUAL


def peak_of_this_machine(gpus: int, precision: str) -> float | None:
    """FLOP/s of so many of its GPUs; None if they are not in the table, or there is none."""
    gpu = _gpu_here()
    return None if gpu is None else gpus * peak(gpu, precision)


def _gpu_here() -> str | None:
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_name()
    words = re.split(r"[\s-]+", device.replace("RTX ", "RTX"))
    return None if SLOWER.search(device) else next((name for name in GPUS if name in words), None)


def peak(gpu: str, precision: str) -> float:
    """FLOP/s. ConfigError if the GPU does not compute in this precision."""
    found = GPUS[gpu].bf16 if precision == "bf16" else GPUS[gpu].fp32
    if found is None:
        raise ConfigError("--gpu", f"={gpu} has no bf16; set train.mixed_precision=fp32 and sample.precision=fp32")
    return found


# --------------------------------------------------------------------------------------------------------------- FLOPs


def forward_flops_at(model: TransformerConfig, active: float | None) -> float:
    """FLOPs of one sample, an image or a sequence, when a token uses `active` routed experts in the mean of MoE layers.

    The target still decides how wide an expert is. A multiply-add counts 2, as in `Footprint.forward_flops`; divide by
    ``model.tokens`` for those of a token.

    Args:
        model: resolved, with the fields that follow from the data.
        active: measured; None for a model without experts, and for no other.

    Raises ValueError for a mean that the model cannot have.
    """
    flops, moe = model.footprint().forward_flops, model.moe
    if moe is None or active is None:
        if moe is not None or active is not None:
            raise ValueError(f"active={active} of a model {'without' if moe is None else 'with'} experts")
        return flops
    if not 0 <= active <= moe.experts:
        raise ValueError(f"active={active:g} must lie in [0, {moe.experts}], the number of experts")
    return flops + 2 * model.tokens * (active / moe.target - 1) * model.expert_weights().active


def training_flops(experiment: Any) -> float:
    """Of one row in training, activations computed twice where the config says so."""
    model = experiment.model
    passes = 4 if model.recompute else 3  # a backward pass costs two forward ones
    again = 2 * model.tokens * model.expert_weights().active if model.moe is not None and model.moe.recompute else 0
    return passes * model.footprint().forward_flops + again


def evaluations(experiment: Experiment) -> int:
    """Of the network, for one image made by the section `sample`."""
    model, sample = experiment.model, experiment.sample
    objective = OBJECTIVES.build(experiment.objective, num_classes=model.num_classes)
    shape = (model.in_channels, model.input_size, model.input_size)
    return SAMPLERS.build(sample.sampler, objective).evaluations(sample.guidance, shape)


def sampling_flops(experiment: Experiment) -> float:
    """Of one image made by the section `sample`, without its decoding.

    With the experts of `sample.target` where that is one number, or else those of training.
    """
    model, target = experiment.model, experiment.sample.target
    flops = forward_flops_at(model, target) if isinstance(target, float) else model.footprint().forward_flops
    return evaluations(experiment) * flops


# -------------------------------------------------------------------------------------------------------- the estimate


def add_cost_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that are the arguments of `describe`."""
    known = f"what --dry-run estimates for: {', '.join(GPUS)}, or cpu, this one, timed; default this machine's"
    parser.add_argument("--gpu", metavar="NAME", help=f"{known}, or {USUAL} if its GPU is none of these")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="how many of them; default %(default)s")
    share = f"share of their peak FLOP/s that a step reaches, recompute counted; default {MFU}, an assumption"
    parser.add_argument("--mfu", type=float, metavar="SHARE", help=share)


def describe(
    experiment: Experiment | TextExperiment, gpu: str | None = None, gpus: int = 1, mfu: float | None = None
) -> str:
    """The resolved config and, as YAML comments below it, what it will cost on `gpus` GPUs of one kind.

    Args:
        experiment: resolved.
        gpu: a name of `GPUS`; or ``cpu``, that of this machine, on which a few passes are timed; None: this machine's.
        mfu: share of the peak FLOP/s that is reached; None assumes `MFU`.

    Raises ConfigError for a GPU that is not in the table or cannot run the experiment, and for other impossible values.
    """
    there = None
    if gpu is None:
        gpu = of_this_machine(gpus, mfu)
        if gpu == _gpu_here():  # several have half the memory of their namesakes
            there = torch.cuda.get_device_properties().total_memory
    if gpu not in (CPU, *GPUS):
        raise ConfigError("--gpu", f"={gpu} is not in the table; {did_you_mean(gpu, [CPU, *GPUS])}")
    if gpu == CPU and (gpus > 1 or mfu is not None):
        raise ConfigError("--gpu", "=cpu is this machine, and is timed; drop --gpus and --mfu")
    if gpus < 1:
        raise ConfigError("--gpus", f"={gpus} must be at least 1")
    if mfu is not None and not 0 < mfu <= 1:
        raise ConfigError("--mfu", f"={mfu} must be above 0 and at most 1")
    if there is None:
        there = memory_of_machine() if gpu == CPU else GPUS[gpu].memory * GIB
    lines = _lines(experiment, gpu, gpus, mfu, there / GIB)
    return config.to_yaml(experiment) + "\n".join(f"# {line}" for line in lines)


def _lines(
    experiment: Experiment | TextExperiment, gpu: str, gpus: int, mfu: float | None, there: float
) -> Iterator[str]:
    model, train, is_text = experiment.model, experiment.train, isinstance(experiment, TextExperiment)
    footprint, training = model.footprint(), training_flops(experiment)
    rows, row_name = train.steps * train.batch_size, "sequences" if is_text else "images"
    per_row, unit = (model.tokens, "tokens") if is_text else (1, "images")  # what training is counted in
    yield f"parameters        {footprint.total_params:,} in all, {footprint.active_params:,.0f} active per token"
    each = f"{footprint.forward_flops / per_row:.4g} forward, {training / per_row:.4g} in training"
    if isinstance(experiment, TextExperiment):
        whole = f"{footprint.forward_flops:.4g} and {training:.4g} a sequence of {per_row:,}"
        yield f"FLOPs per token   {each}; {whole}"
    else:
        sampling = f"{sampling_flops(experiment):.4g} to sample it in {evaluations(experiment)} evaluations"
        yield f"FLOPs per image   {each}, {sampling}"
    count = f"{rows:,} {row_name}" + (f", {rows * per_row:,} {unit}" if per_row > 1 else "")
    yield f"training          {train.steps:,} steps, {count}, {training * rows:.4g} FLOPs"
    yield from _memory_lines(experiment, gpu, gpus, row_name, there)
    if model.moe is not None and model.moe.implementation == "auto":
        device, dtype = ("cpu" if gpu == CPU else "cuda"), _precision_on(gpu, train.mixed_precision)
        at_a_time = _rows_at_a_time(train, gpus)
        taken = model.implementation(at_a_time, device, torch.bfloat16 if dtype == "bf16" else torch.float32)
        yield f"experts           {taken}, which is what model.moe.implementation=auto means there"
    reached, where = _reached(experiment, gpu, gpus, mfu, train.mixed_precision)
    if reached is None:
        yield f"time              {where}"
    else:
        rows_per_s = reached / training
        yield f"time              {_duration(rows / rows_per_s)}, {speed(rows_per_s * per_row)} {unit}/s on {where}"
    if not isinstance(experiment, TextExperiment):
        sample = experiment.sample
        if gpu != CPU:
            reached, _ = _reached(experiment, gpu, gpus, mfu, sample.precision)
        if reached is not None:
            seconds = sampling_flops(experiment) * sample.count / reached
            yield f"sampling          {_duration(seconds)} for {sample.count:,} images in {sample.precision}"
        if isinstance(experiment.first_stage, AutoencoderConfig) and not isinstance(experiment.data, LatentsConfig):
            yield "not in these      the encoder's time and memory; it runs for every image of every step"
    moe = model.moe
    note = None if moe is None else moe.router.note(moe.target, moe.experts, model.tokens)
    if note is not None:
        yield f"note: {note}"


def _reached(experiment: Any, gpu: str, gpus: int, mfu: float | None, wanted: str) -> tuple[float | None, str]:
    """FLOP/s in the precision `wanted`, and on what; None, and why, where they are not known."""
    precision = _precision_on(gpu, wanted)
    if gpu == CPU:
        found = flops_per_second(experiment, training_flops(experiment), precision)
        if found is None:
            return None, "not known: one image or sequence of so large a model takes a CPU too long to be timed here"
        threads = torch.get_num_threads()
        with_threads = f"{threads} thread{'s' if threads > 1 else ''}"
        return found, f"this CPU with {with_threads} in {precision}, as a few passes took just now"
    share = MFU if mfu is None else mfu
    source = "an assumption, state another with --mfu" if mfu is None else "as stated"
    most = peak(gpu, precision)
    return gpus * most * share, f"{gpus} × {gpu} at {share:.0%} of {most / 1e12:g} TFLOP/s in {precision} ({source})"


def _precision_on(gpu: str, wanted: str) -> str:
    """What ``mixed_precision=wanted`` comes to on this GPU, or on the CPU."""
    return ("fp32" if gpu == CPU or GPUS[gpu].bf16 is None else "bf16") if wanted == "auto" else wanted


def _duration(seconds: float) -> str:
    unit, length = next((each for each in TIME_UNITS if seconds >= 2 * each[1]), TIME_UNITS[-1])
    return f"{rounded(seconds / length, 1)} {unit}"


def _rows_at_a_time(train: Any, gpus: int) -> int:
    """Of each GPU. ConfigError unless the GPUs can share the batch equally."""
    if train.batch_size % gpus:
        problem = f"={train.batch_size} cannot be shared equally by {gpus} GPUs; use a multiple"
        raise ConfigError("train.batch_size", problem)
    share: int = train.batch_size // gpus
    return min(train.micro_batch or share, share)


def _memory_lines(experiment: Any, name: str, gpus: int, unit: str, there: float) -> Iterator[str]:
    """On the GPU `name` with `there` GiB; a row is one of `unit`.

    ConfigError unless the GPUs can share the batch equally.
    """
    train, precision = experiment.train, _precision_on(name, experiment.train.mixed_precision)
    rows = _rows_at_a_time(train, gpus)
    held = memory(experiment, precision, gpus, rows)
    parts = ", ".join(f"{part} {rounded(size / GIB, 1)}" for part, size in held.items())
    total = sum(held.values())
    in_all = rounded(total / GIB, 1)
    where = "memory            " if name == CPU else "memory per GPU    "
    yield f"{where}{in_all} GiB with {rows} {unit} at a time ({name}: {there:.0f}): {parts}"
    other = not experiment.model.recompute
    instead = activation_bytes(experiment.model, rows, precision, recompute=other) / GIB
    yield f"                  with model.recompute={str(other).lower()}: activations {rounded(instead, 1)}"
    most_active = peak_active(experiment.model)
    if most_active is not None:
        total = sum(memory(experiment, precision, gpus, rows, most_active).values())
        active = f"{most_active:g} active experts where the target is {experiment.model.moe.target:g}"
        yield f"                  {rounded(total / GIB, 1)} GiB at {active}, a peak that early training may have"
    if total > ROOM * there * GIB:
        tried = _settings_that_fit(experiment, precision, gpus, rows, ROOM * there * GIB)
        more = "train a smaller model" if name == CPU else "use more GPUs with train.parallel=fsdp2, or larger ones"
        advice = "; or ".join(tried) or f"no setting helps; {more}"
        yield f"warning: more than {ROOM:.0%} of that memory. What would fit: {advice}"


def _recomputations(model: TransformerConfig) -> list[tuple[bool, bool]]:
    """What may be computed again, whole blocks or their experts: as the config says, and what costs more time."""
    blocks, experts = model.recompute, model.moe is not None and model.moe.recompute
    options = [(blocks, experts), (blocks, model.moe is not None), (True, experts)]
    return list(dict.fromkeys(options)) if not blocks else [(blocks, experts)]


def _settings_that_fit(experiment: Any, precision: str, gpus: int, rows: int, limit: float) -> Iterator[str]:
    """Overrides with which the experiment stays below `limit` bytes on each GPU, the cheapest first."""
    for parallel in dict.fromkeys([experiment.train.parallel, "fsdp2" if gpus > 1 else experiment.train.parallel]):
        for recompute, of_experts in _recomputations(experiment.model):
            moe = experiment.model.moe
            changed = replace(
                experiment,
                model=replace(
                    experiment.model,
                    recompute=recompute,
                    moe=None if moe is None else replace(moe, recompute=of_experts),
                ),
                train=replace(experiment.train, parallel=parallel),
            )
            parts = (n for n in range(rows, 0, -1) if rows % n == 0)
            active = peak_active(changed.model)
            fitting = next((n for n in parts if sum(memory(changed, precision, gpus, n, active).values()) <= limit), 0)
            changes = {
                "train.micro_batch": (str(fitting), fitting < rows),
                "model.recompute": ("true", recompute != experiment.model.recompute),
                "model.moe.recompute": ("true", moe is not None and of_experts != moe.recompute),
                "train.parallel": (parallel, parallel != experiment.train.parallel),
            }
            if fitting:
                yield " ".join(f"{key}={value}" for key, (value, differs) in changes.items() if differs)
