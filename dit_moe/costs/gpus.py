"""What GPUs can do, and what share of it a training step reaches."""

from __future__ import annotations

from dataclasses import dataclass

from dit_moe.config import ConfigError

GIB = 2**30
MFU = 0.35  # share of the peak that a step reaches when none is stated
ROOM = 0.9  # of a GPU's memory; the rest is the driver's, the allocator's gaps, and gradients on their way


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


def precision_on(gpu: str, wanted: str) -> str:
    """What ``mixed_precision=wanted`` comes to on this GPU."""
    return ("fp32" if GPUS[gpu].bf16 is None else "bf16") if wanted == "auto" else wanted


def peak(gpu: str, precision: str) -> float:
    """FLOP/s. ConfigError if the GPU does not compute in this precision."""
    found = GPUS[gpu].bf16 if precision == "bf16" else GPUS[gpu].fp32
    if found is None:
        raise ConfigError("--gpu", f"={gpu} has no bf16; set train.mixed_precision=fp32 and sample.precision=fp32")
    return found
