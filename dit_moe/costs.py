"""What an experiment will cost: parameters, FLOPs, memory on each GPU, time. Nothing is built and no data is read."""

# D width, H hidden width of a feed-forward, E experts; bytes and FLOPs are floats

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dit_moe import config
from dit_moe.config import ConfigError
from dit_moe.data.latents import LatentsConfig
from dit_moe.diffusion import OBJECTIVES, SAMPLERS
from dit_moe.experiment import Experiment
from dit_moe.latents.autoencoder import AutoencoderConfig
from dit_moe.models import DiTConfig
from dit_moe.models.dit_config import FREQUENCIES
from dit_moe.registry import did_you_mean

GIB = 2**30
MFU = 0.35  # share of the peak that a step reaches when none is stated
ROOM = 0.9  # of a GPU's memory; the rest is the driver's, the allocator's gaps, and gradients on their way
FP32 = 4  # bytes
UNITS = (("days", 86_400), ("hours", 3600), ("minutes", 60), ("seconds", 1))


@dataclass(frozen=True)
class GPU:
    """Peak dense FLOP/s, products of matrices accumulated in fp32, and GiB of memory."""

    bf16: float | None  # None: it has none, and trains in fp32
    fp32: float  # without TF32, as `processes` sets it
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


def add_cost_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what `describe` reckons with."""
    known = f"what --dry-run reckons with: {', '.join(GPUS)}; default %(default)s"
    parser.add_argument("--gpu", default="H100", metavar="NAME", help=known)
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="how many of them; default %(default)s")
    share = f"share of their peak FLOP/s that a step reaches, recompute counted; default {MFU}, an assumption"
    parser.add_argument("--mfu", type=float, metavar="SHARE", help=share)


def describe(experiment: Experiment, gpu: str = "H100", gpus: int = 1, mfu: float | None = None) -> str:
    """The resolved config and, as YAML comments below it, what it will cost on `gpus` GPUs of one kind.

    Args:
        experiment: settled.
        gpu: a name of `GPUS`.
        mfu: share of the peak FLOP/s that is reached; None assumes `MFU`.

    Raises ConfigError for a GPU that is not in the table or cannot run the experiment, and for other impossible values.
    """
    if gpu not in GPUS:
        raise ConfigError("--gpu", f"={gpu} is not in the table; {did_you_mean(gpu, GPUS)}")
    for option, value, fits, wanted in (
        ("--gpus", gpus, gpus >= 1, "at least 1"),
        ("--mfu", mfu, mfu is None or 0 < mfu <= 1, "above 0 and at most 1"),
    ):
        if not fits:
            raise ConfigError(option, f"={value} must be {wanted}")
    lines = [*_work(experiment), *_memory_lines(experiment, GPUS[gpu], gpu, gpus), *_time(experiment, gpu, gpus, mfu)]
    if isinstance(experiment.first_stage, AutoencoderConfig) and not isinstance(experiment.data, LatentsConfig):
        lines.append("not in these      the encoder's time and memory; it runs for every image of every step")
    return config.to_yaml(experiment) + "\n".join(f"# {line}" for line in lines)


# --------------------------------------------------------------------------------------------------- FLOPs and time


def training_flops(experiment: Experiment) -> float:
    """Of one image in training, activations computed twice where the config says so."""
    passes = 4 if experiment.model.recompute else 3  # a backward pass costs two forward ones
    return passes * experiment.model.footprint().forward_flops


def sampling_flops(experiment: Experiment) -> float:
    """Of one image made by the section `sample`, without its decoding."""
    return evaluations(experiment) * experiment.model.footprint().forward_flops


def evaluations(experiment: Experiment) -> int:
    """Of the network, for one image made by the section `sample`."""
    model, sample = experiment.model, experiment.sample
    objective = OBJECTIVES.build(experiment.objective, num_classes=model.num_classes)
    shape = (model.in_channels, model.input_size, model.input_size)
    return SAMPLERS.build(sample.sampler, objective).evaluations(sample.guidance, shape)


def _work(experiment: Experiment) -> Iterator[str]:
    footprint, train = experiment.model.footprint(), experiment.train
    image, images = training_flops(experiment), train.steps * train.batch_size
    yield f"parameters        {footprint.total_params:,} in all, {footprint.active_params:,.0f} active per token"
    sampling = f"{sampling_flops(experiment):.4g} to sample it in {evaluations(experiment)} evaluations"
    yield f"FLOPs per image   {footprint.forward_flops:.4g} forward, {image:.4g} in training, {sampling}"
    yield f"training          {train.steps:,} steps, {images:,} images, {image * images:.4g} FLOPs"


def _time(experiment: Experiment, gpu: str, gpus: int, mfu: float | None) -> Iterator[str]:
    train, sample = experiment.train, experiment.sample
    precision, share = precision_on(experiment, gpu), MFU if mfu is None else mfu
    source = "an assumption, state another with --mfu" if mfu is None else "as stated"
    speed = gpus * peak(gpu, precision) * share / training_flops(experiment)
    steps = _duration(train.steps * train.batch_size / speed)
    where = f"{gpus} × {gpu} at {share:.0%} of {peak(gpu, precision) / 1e12:g} TFLOP/s in {precision} ({source})"
    yield f"time              {steps}, {speed:,.0f} images/s on {where}"
    sampled = sampling_flops(experiment) * sample.count / (gpus * peak(gpu, sample.precision) * share)
    yield f"sampling          {_duration(sampled)} for {sample.count:,} images in {sample.precision}"


def precision_on(experiment: Experiment, gpu: str) -> str:
    """What ``train.mixed_precision`` comes to on this GPU."""
    wanted = experiment.train.mixed_precision
    return ("fp32" if GPUS[gpu].bf16 is None else "bf16") if wanted == "auto" else wanted


def peak(gpu: str, precision: str) -> float:
    """FLOP/s. ConfigError if the GPU does not compute in this precision."""
    found = GPUS[gpu].bf16 if precision == "bf16" else GPUS[gpu].fp32
    if found is None:
        raise ConfigError("--gpu", f"={gpu} has no bf16; set train.mixed_precision=fp32 and sample.precision=fp32")
    return found


def _duration(seconds: float) -> str:
    unit, length = next((each for each in UNITS if seconds >= 2 * each[1]), UNITS[-1])
    return f"{seconds / length:.1f} {unit}"


# ----------------------------------------------------------------------------------------------------------- memory


def memory(experiment: Experiment, precision: str, gpus: int, images: int) -> dict[str, float]:
    """Bytes on each GPU by what they hold, with `images` in a forward pass.

    Their sum is an upper bound: gradients come as activations go. Left out are the loss's own tensors, a few times the
    latents', and a first stage that encodes on the fly.
    """
    model, train = experiment.model, experiment.train
    whole = FP32 * model.footprint().total_params
    sharded = gpus > 1 and train.parallel == "fsdp2"
    part = whole / gpus if sharded else whole
    several = images * gpus < train.batch_size
    held = {
        "weights": part,
        "gradients": whole if several and sharded else part,  # micro-batches add up whole ones
        "AdamW": 2 * part,
        "EMA": part,
    }
    if sharded:
        held["gathered blocks"] = 3 * whole / model.depth  # weights of this one and the next, gradients of one
    return held | {"activations": activation_bytes(model, images, precision)}


def activation_bytes(model: DiTConfig, images: int, precision: str, recompute: bool | None = None) -> float:
    """What the backward pass of `images` needs of the forward pass; routers at their target.

    Args:
        recompute: None is what the model says.
    """
    e, d = (2 if precision == "bf16" else FP32), model.need("width")
    blocks = [_block(model, index, e) for index in range(model.need("depth"))]
    tokens = images * model.tokens
    # The final layer's norm and linear; the embedding of time, the conditioning c, and the final layer's adaLN.
    ends = _Saved(token=8 * d + 8 + e * d, image=e * (FREQUENCIES + 5 * d) + 4 * d, weights=3 * d * d)
    if model.recompute if recompute is None else recompute:
        largest = max(blocks, key=lambda block: block.bytes(tokens, images, e))
        inputs = _Saved(token=FP32 * d * (len(blocks) - 1))  # of the other blocks
        # At the end of the forward pass autocast holds a copy of every matrix but the experts', which cast their own.
        copies = sum(block.cached for block in blocks) * e if e < FP32 else 0
        inside = max(largest.bytes(tokens, images, e), copies)
        return ends.bytes(tokens, images, e) + inputs.bytes(tokens, images, e) + inside
    return sum(saved.bytes(tokens, images, e) for saved in (ends, *blocks))


@dataclass(frozen=True)
class _Saved:
    """What autograd keeps of a part of the network: bytes for each token and each image, and matrices it multiplies.

    In bf16 it keeps a copy of every matrix; in fp32 it keeps the parameter itself, which costs nothing.
    """

    token: float = 0
    image: float = 0
    weights: int = 0  # elements
    cached: int = 0  # those of them that autocast copies by itself

    def bytes(self, tokens: float, images: float, e: int) -> float:
        return self.token * tokens + self.image * images + (self.weights * e if e < FP32 else 0)


def _block(model: DiTConfig, index: int, e: int) -> _Saved:
    """One transformer block that computes in numbers of `e` bytes. The residual stream and its norms are in fp32."""
    d, h = model.need("width"), model.need("mlp_hidden")
    moe = model.moe if model.has_experts(index) else None
    # Twice: input of a norm, its output and two statistics; input of qkv; q, k and v; output of attention, and its
    # logarithm of sums for each head; output of the projection.
    token: float = 2 * (8 * d + 8) + e * 6 * d + 4 * model.need("heads")
    if model.qk_norm:  # without a fused kernel: q and k normalised and scaled, in bf16 also as fp32; attention's output
        token += 8 * d + 3 * e * d + (8 * d if e < FP32 else 0)
    image = e * 9 * d  # adaLN's input and six outputs, and 1 + scale twice
    cached = 10 * d * d  # adaLN, qkv, projection
    if moe is None:  # input of the first matrix; before and after the activation; output, for the gate
        return _Saved(token + e * (2 * d + 2 * h), image, cached + 2 * d * h, cached + 2 * d * h)
    w = moe.hidden(h)
    into, acting = (2 * w, 4 * w) if moe.activation == "swiglu" else (w, 2 * w)  # first matrix; before and after
    token += 8 * d + moe.experts * (25 if moe.router.drn else 21) + 16  # the router's input, the sum; probabilities
    token += moe.target * (e * (2 * d + acting) + 4 * d + 20)  # rows in and out, out once more weighted; indices
    matrices = d * (into + w)
    if moe.shared_experts:
        token += moe.shared_experts * e * acting + (2 * d if e < FP32 else 0)
        cached += moe.shared_experts * matrices
    return _Saved(token, image, cached + moe.experts * matrices, cached)


def _memory_lines(experiment: Experiment, gpu: GPU, name: str, gpus: int) -> Iterator[str]:
    train, precision = experiment.train, precision_on(experiment, name)
    if train.batch_size % gpus:
        problem = f"={train.batch_size} cannot be shared equally by {gpus} GPUs; use a multiple"
        raise ConfigError("train.batch_size", problem)
    share = train.batch_size // gpus
    images = min(train.micro_batch or share, share)
    held = memory(experiment, precision, gpus, images)
    parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in held.items())
    total = sum(held.values())
    yield f"memory per GPU    {total / GIB:.1f} GiB with {images} images at a time ({name}: {gpu.memory}): {parts}"
    other = not experiment.model.recompute
    instead = activation_bytes(experiment.model, images, precision, recompute=other) / GIB
    yield f"                  with model.recompute={str(other).lower()}: activations {instead:.1f}"
    if total > ROOM * gpu.memory * GIB:
        tried = _remedies(experiment, precision, gpus, images, ROOM * gpu.memory * GIB)
        advice = "; or ".join(tried) or "no setting helps; use more GPUs with train.parallel=fsdp2, or larger ones"
        yield f"warning: more than {ROOM:.0%} of that memory. What would fit: {advice}"


def _remedies(experiment: Experiment, precision: str, gpus: int, images: int, limit: float) -> Iterator[str]:
    """Overrides with which the experiment stays below `limit` bytes on each GPU, the cheapest first."""
    for parallel in dict.fromkeys([experiment.train.parallel, "fsdp2" if gpus > 1 else experiment.train.parallel]):
        for recompute in dict.fromkeys([experiment.model.recompute, True]):
            changed: Any = replace(
                experiment,
                model=replace(experiment.model, recompute=recompute),
                train=replace(experiment.train, parallel=parallel),
            )
            parts = (n for n in range(images, 0, -1) if images % n == 0)
            fitting = next((n for n in parts if _total(changed, precision, gpus, n) <= limit), 0)
            changes = {
                "train.micro_batch": (str(fitting), fitting < images),
                "model.recompute": ("true", recompute != experiment.model.recompute),
                "train.parallel": (parallel, parallel != experiment.train.parallel),
            }
            if fitting:
                yield " ".join(f"{key}={value}" for key, (value, differs) in changes.items() if differs)


def _total(experiment: Experiment, precision: str, gpus: int, images: int) -> float:
    return sum(memory(experiment, precision, gpus, images).values())
