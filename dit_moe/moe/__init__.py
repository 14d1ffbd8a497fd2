"""Mixture-of-Experts layers: routers, the threshold's controller, the experts' engine, losses and statistics."""

from dit_moe.moe.activations import MATRICES, Activation
from dit_moe.moe.compute_budget import calibrate, controlled_routers, needs_calibration
from dit_moe.moe.experts import Experts
from dit_moe.moe.layer import FeedForward, MoEConfig, MoELayer
from dit_moe.moe.router_update import (
    ActiveExperts,
    collapsed,
    counted_active,
    counted_dropped,
    measure_active,
    measure_layers,
    no_active_experts,
    notes,
    observe_routers,
    routers_of,
    update_routers,
)
from dit_moe.moe.routers import ROUTERS, Router, RouterConfig
from dit_moe.moe.routing import Routing, RoutingContext

__all__ = [
    "MATRICES",
    "ROUTERS",
    "Activation",
    "ActiveExperts",
    "Experts",
    "FeedForward",
    "MoEConfig",
    "MoELayer",
    "Router",
    "RouterConfig",
    "Routing",
    "RoutingContext",
    "calibrate",
    "collapsed",
    "controlled_routers",
    "counted_active",
    "counted_dropped",
    "measure_active",
    "measure_layers",
    "needs_calibration",
    "no_active_experts",
    "notes",
    "observe_routers",
    "routers_of",
    "update_routers",
]
