"""Files of weights as other suites write them, of the golden networks."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent.parent / "golden"
BUNDLED = ("first_stage.model=digits", "first_stage.shift=null", "first_stage.scale=null")  # also of 4 channels
HEADS = "model.heads=3"  # of all golden networks
ARGUMENTS: dict[str, dict[str, Any]] = {
    "dit": {"model": "DiT-S/2", "vae": "ema", "num_classes": 7},
    "dit_moe": {"model": "DiT-S/2", "num_experts": 4, "num_experts_per_tok": 2, "rf": True},
    "sit": {"model": "SiT-S/2", "path_type": "Linear", "prediction": "velocity"},
}


def golden(name: str) -> dict[str, Tensor]:
    """All numbers of a golden file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if key != "config"}


def weights_of(name: str) -> dict[str, Tensor]:
    """The state dict of a golden network."""
    return {key[2:]: tensor for key, tensor in golden(name).items() if key.startswith("w.")}


def bare(path: Path, name: str) -> Path:
    """A file with the state dict alone, as published weights are."""
    torch.save(weights_of(name), path)
    return path


def of_training(path: Path, name: str, **arguments: Any) -> Path:
    """A checkpoint as the suite's training script writes it; its raw weights are others than the averaged ones."""
    ema = weights_of(name)
    given = argparse.Namespace(**(ARGUMENTS[name] | arguments))
    torch.save({"model": {key: 0.9 * each for key, each in ema.items()}, "ema": ema, "opt": {}, "args": given}, path)
    return path
