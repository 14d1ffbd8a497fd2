"""What the benchmarks of speed share: contestants take turns in one process, and each measurement is a line of JSON."""

from __future__ import annotations

import json
import platform
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP = 5  # turns of each, in which the allocator also finds its places


def take_turns(contestants: Mapping[str, Callable[[], object]], turns: int, device: torch.device) -> dict[str, float]:
    """Seconds of each contestant, the median of `turns`. What slows the machine for a while slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(WARM_UP + turns):
        for name, call in contestants.items():
            wait_for(device)
            start = time.perf_counter()
            call()
            wait_for(device)
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def add_machine_arguments(parser: ArgumentParser) -> None:
    """--device, --dtypes and --turns."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", default="fp32,bf16", help="of %(default)s")
    parser.add_argument("--turns", type=int, default=7)


def show(benchmark: str, device: torch.device, **facts: Any) -> None:
    """Print a measurement with what it was made on."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    made = {"machine": machine, "threads": torch.get_num_threads(), "torch": version("torch")}
    rounded = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in facts.items()}
    print(json.dumps({"benchmark": benchmark, **rounded, **made}), flush=True)


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
