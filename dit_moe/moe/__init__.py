"""Mixture-of-Experts layers: routers, the threshold's controller, the experts' engine, losses and telemetry."""

from dit_moe.moe.calibrate import calibrate, starts_unsolved, steered_routers
from dit_moe.moe.experts import MATRICES, Activation, Experts
from dit_moe.moe.layer import FeedForward, MoEConfig, MoELayer
from dit_moe.moe.router_update import (
    Activity,
    activities,
    counted_active,
    measure_active,
    measure_layers,
    notes,
    routers_of,
    update_routers,
)
from dit_moe.moe.routers import ROUTERS, Router, RouterConfig
from dit_moe.moe.routing import Routing

__all__ = [
    "MATRICES",
    "ROUTERS",
    "Activation",
    "Activity",
    "Experts",
    "FeedForward",
    "MoEConfig",
    "MoELayer",
    "Router",
    "RouterConfig",
    "Routing",
    "activities",
    "calibrate",
    "counted_active",
    "measure_active",
    "measure_layers",
    "notes",
    "routers_of",
    "starts_unsolved",
    "steered_routers",
    "update_routers",
]
