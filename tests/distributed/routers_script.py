"""Train with every router, a few steps each: FOLDER/rank_<i>.pt has what `trained` returned of each case.

In two processes the batch is shared out; in one, it is whole.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_moe.models import MODELS, DiTConfig
from dit_moe.moe import ROUTERS, MoEConfig, needs_calibration
from dit_moe.training import TrainConfig
from dit_moe.training.data_loader import Prefetcher
from dit_moe.training.devices import build_accelerator
from dit_moe.training.step import TrainingStep
from tests.training.tiny_run import DIGITS, SEED, digits, flow, to_latents

# A large ε: without it AdamW makes a whole step of a gradient that is only rounding.
TRAIN = TrainConfig(steps=4, batch_size=16, lr=1e-2, eps=1e-3)
SHAPE = {"width": 32, "depth": 2, "heads": 2, "in_channels": 1, "input_size": 8, "num_classes": len(DIGITS)}
OPTIONS: dict[str, dict[str, Any]] = {  # of cases beside each router by itself, called "<router>, <option>"
    "dtopp, layerwise": {"layerwise": True},
    "expert_threshold, warmup_steps": {"warmup_steps": 0},
    "topp, bias_rate": {"bias_rate": 1e-3},
}


def cases() -> list[str]:
    return [*ROUTERS.names(), *OPTIONS]


def config_of(case: str) -> Any:
    return ROUTERS.config_class(case.partition(",")[0])(**OPTIONS.get(case, {}))


def trained(case: str, run: Path) -> list[tuple[float, dict[str, Tensor]]]:
    """After each step its mean of active experts, and all weights and buffers of the model and of its average."""
    torch.manual_seed(0)
    moe = MoEConfig(router=config_of(case), implementation="by_expert")
    model = MODELS.build(DiTConfig(name="DiT-custom/2-4E2A", moe=moe, **SHAPE))
    batches = Prefetcher(TRAIN, digits(run), to_latents, SEED)
    step = TrainingStep(TRAIN, build_accelerator(TRAIN, run), model, flow(len(DIGITS)))
    batches.start(0, TRAIN.steps)
    if needs_calibration(step.model):
        step.calibrate(batches.ready)
    found = []
    for number in range(TRAIN.steps):
        _, routers = step(number, batches.ready, report=True)
        batches.advance()
        whole = torch.nn.ModuleDict({"model": step.model, "average": step.ema.module})
        found.append((routers["active"], {name: tensor.clone() for name, tensor in whole.state_dict().items()}))
    return found


if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    torch.save({case: trained(case, FOLDER) for case in cases()}, FOLDER / f"rank_{os.environ['RANK']}.pt")
