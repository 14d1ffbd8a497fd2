"""The one registry through which training, sampling and evaluation build their networks."""

from dit_moe.models.base import MODELS, Footprint
from dit_moe.models.dit import DiT, DiTConfig
from dit_moe.models.lm import LM, LMConfig

__all__ = ["LM", "MODELS", "DiT", "DiTConfig", "Footprint", "LMConfig"]
