"""Which processes work together, and on which device each does: the one place that asks accelerate."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from dit_moe.config import ConfigError


def use_cpu() -> bool:
    """Whether to compute on the CPU: there is nothing else, or ACCELERATE_USE_CPU says so.

    accelerate has to be told: by itself it takes processes started on a machine without GPUs for so many single ones.
    """
    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def join_processes() -> PartialState:
    """This process's place: alone, or one of those that `accelerate launch` or torchrun started.

    Raises ConfigError if the processes that were started cannot form a group.
    """
    state = PartialState(cpu=use_cpu())
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        problem = f"={launched} processes were launched, but they cannot form a group on {state.device.type}"
        raise ConfigError("WORLD_SIZE", f"{problem}; launch one, or set ACCELERATE_USE_CPU=true")
    return state
