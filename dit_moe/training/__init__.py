"""The training loop and what belongs to it. It knows models, objectives and data only as callables."""

from dit_moe.training.config import TrainConfig
from dit_moe.training.ema import EMA
from dit_moe.training.errors import Interrupted, TrainingError
from dit_moe.training.fine_tune import open_start
from dit_moe.training.progress import Unit
from dit_moe.training.trainer import Hook, Trainer

__all__ = ["EMA", "Hook", "Interrupted", "TrainConfig", "Trainer", "TrainingError", "Unit", "open_start"]
