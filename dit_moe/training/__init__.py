"""The training loop and what belongs to it. It knows models, objectives and data only as callables."""

from dit_moe.training.config import TrainConfig
from dit_moe.training.interrupt import Interrupted, TrainingError
from dit_moe.training.log import Unit
from dit_moe.training.run_start import open_start
from dit_moe.training.step import EMA, TrainingStep
from dit_moe.training.trainer import Hook, Trainer

__all__ = [
    "EMA",
    "Hook",
    "Interrupted",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "TrainingStep",
    "Unit",
    "open_start",
]
