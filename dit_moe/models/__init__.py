"""The one registry through which training, sampling and evaluation build their networks."""

from dit_moe.models.base import MODELS, Footprint
from dit_moe.models.dit import DiT
from dit_moe.models.dit_config import DiTConfig

__all__ = ["MODELS", "DiT", "DiTConfig", "Footprint"]
