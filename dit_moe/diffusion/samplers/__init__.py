"""Samplers: from noise to latents with a trained network. A new file here registers itself."""

from dit_moe.diffusion.samplers.base import Sampler, SamplerConfig, SamplingError, check_fit
from dit_moe.registry import import_submodules

import_submodules(__name__, __path__)

__all__ = ["Sampler", "SamplerConfig", "SamplingError", "check_fit"]
