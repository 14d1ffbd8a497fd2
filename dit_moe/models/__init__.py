"""The one registry through which training, sampling and evaluation build their networks."""

from dit_moe.models.base import MODELS, Footprint
from dit_moe.models.dit import DiT
from dit_moe.models.dit_config import DiTConfig
from dit_moe.models.lm import LM
from dit_moe.models.lm_config import LMConfig

__all__ = ["LM", "MODELS", "DiT", "DiTConfig", "Footprint", "LMConfig"]
