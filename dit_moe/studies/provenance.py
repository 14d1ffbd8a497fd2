"""On what, and with which software, a number was made: it is kept beside the number."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("dit_moe", "torch", "torchvision", "diffusers", "timm", "numpy")


def provenance(precision: str) -> dict[str, Any]:
    """Of this process: {"machine": {"cpu", "cores", "gpu"}, "versions", "threads", "precision"}.

    Args:
        precision: of the computation, as in the section train.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "gpu": gpu},
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "precision": precision,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
