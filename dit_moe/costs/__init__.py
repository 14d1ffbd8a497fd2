"""What an experiment will cost: parameters, FLOPs, memory on each GPU, time. Nothing is built and no data is read."""

from dit_moe.costs.estimate import (
    GIB,
    GPUS,
    MFU,
    ROOM,
    add_cost_arguments,
    describe,
    evaluations,
    forward_flops_at,
    peak,
    sampling_flops,
    training_flops,
)
from dit_moe.costs.memory import activation_bytes, memory

__all__ = [
    "GIB",
    "GPUS",
    "MFU",
    "ROOM",
    "activation_bytes",
    "add_cost_arguments",
    "describe",
    "evaluations",
    "forward_flops_at",
    "memory",
    "peak",
    "sampling_flops",
    "training_flops",
]
