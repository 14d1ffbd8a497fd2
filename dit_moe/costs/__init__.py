"""What an experiment will cost: parameters, FLOPs, memory on each GPU, time. Nothing is built and no data is read."""

from dit_moe.costs.describe import add_cost_arguments, describe
from dit_moe.costs.gpus import GIB, GPUS, MFU, ROOM, peak
from dit_moe.costs.images import evaluations, sampling_flops
from dit_moe.costs.measured import forward_flops_at
from dit_moe.costs.memory import activation_bytes, memory
from dit_moe.costs.time import training_flops

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
