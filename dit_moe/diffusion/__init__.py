"""Diffusion and flow matching: objectives to train with, samplers to generate with. A network is just a callable here.

A new objective is a new file here, a new sampler one in `samplers`; being there is being registered.
"""

from dit_moe.diffusion.base import OBJECTIVES, SAMPLERS, Network, Objective, ObjectiveConfig
from dit_moe.diffusion.ddpm import DDPM, DDPMConfig
from dit_moe.diffusion.flow import Flow, FlowConfig
from dit_moe.diffusion.guidance import GuidanceConfig
from dit_moe.diffusion.samplers import Sampler, SamplerConfig, SamplingError, check_fit
from dit_moe.registry import import_submodules

import_submodules(__name__, __path__)

__all__ = [
    "DDPM",
    "OBJECTIVES",
    "SAMPLERS",
    "DDPMConfig",
    "Flow",
    "FlowConfig",
    "GuidanceConfig",
    "Network",
    "Objective",
    "ObjectiveConfig",
    "Sampler",
    "SamplerConfig",
    "SamplingError",
    "check_fit",
]
