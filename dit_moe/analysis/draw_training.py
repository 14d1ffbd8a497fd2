"""The routers over training: active experts, thresholds, and the scale of their logits."""

# L layers, U logged steps

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_moe.analysis.axes import (
    layer_lines,
    mean_and_target,
    name_lines,
)
from dit_moe.analysis.choose import windows
from dit_moe.analysis.draw_active import ACTIVE
from dit_moe.analysis.stats import Target, Training
from dit_moe.plotting import INK, canvas, styled


@styled
def draw_training(training: Training, layers: Sequence[int], target: Target, *, dark: bool = False) -> Any:
    """Active experts, the threshold p and the scale θ over the steps, one above the other, as far as they are known."""
    panels = [
        (ACTIVE, training.active_LU),
        ("Threshold p", training.p_LU),
        ("Scale of the logits θ", training.theta_LU),
    ]
    known = [(label, values_LU) for label, values_LU in panels if values_LU is not None]
    step_U, mean_U, *curves = windows([training.step_U, training.active_U, *[values_LU for _, values_LU in known]])
    figure, axes = canvas(len(known), 1, height=0.7 + 2.15 * len(known), sharex=True)
    for place, ((label, _), values_LU, axis) in enumerate(zip(known, curves, axes[:, 0], strict=True)):
        if bool(np.all(np.ptp(values_LU, axis=0) < 1e-9)) and len(layers) > 1:
            axis.plot(step_U, values_LU[0], color=INK[dark], linewidth=2.4, label="all layers")
        else:
            layer_lines(figure, axis, step_U, values_LU, layers, dark=dark, names=place == 0)
        if place == 0:
            mean_and_target(axis, step_U, mean_U, target, dark=dark)
            name_lines(axis, layers)
        elif axis.get_legend_handles_labels()[1] == ["all layers"]:
            axis.legend(loc="best")
        axis.set(ylabel=label)
    axes[-1, 0].set(xlabel="Training step")
    return figure
