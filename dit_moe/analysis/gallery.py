"""Which pictures a network's routing has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from dit_moe.analysis.draw_training import draw_training
from dit_moe.analysis.picture import Picture, picture
from dit_moe.analysis.pictures_active import of_examples, of_kinds, of_layers, of_positions, of_times
from dit_moe.analysis.pictures_experts import of_experts
from dit_moe.analysis.stats import RoutingStats
from dit_moe.rounding import rounded


def figures_of(stats: RoutingStats) -> list[Picture]:
    """All pictures that these statistics allow, in the order of the report.

    Where every token uses the same number of experts, as with top-k, those of that number are left out.
    """
    parts: list[Callable[[RoutingStats], Iterator[Picture]]] = [of_experts, of_training]
    if fixed_number(stats) is None:
        parts = [of_layers, of_times, of_examples, of_positions, of_kinds, *parts]
    return [picture for part in parts for picture in part(stats)]


def fixed_number(stats: RoutingStats) -> float | None:
    """The number of experts that every token uses in every layer, if there is one."""
    same = np.ptp(stats.active_L) < 1e-6 and float(stats.active_std_L.max()) < 1e-6
    return float(stats.active_L[0]) if same else None


def of_training(stats: RoutingStats) -> Iterator[Picture]:
    training = stats.training
    if training is None or len(training.step_U) < 2:
        return
    if fixed_number(stats) is not None and training.p_LU is None and training.theta_LU is None:
        return
    late_U = training.active_U[-max(1, len(training.active_U) // 4) :]
    caption = (
        f"Over the last quarter of training, tokens used {late_U.mean():.3f} ± {rounded(late_U.std(), 3)} experts "
        f"({stats.trained_target})."
    )
    if training.p_LU is not None:
        p_U = training.p_LU.mean(0)
        caption += f" The threshold p went from {rounded(p_U[0], 2)} to {rounded(p_U[-1], 2)}."
    if training.theta_LU is not None:
        theta_L = training.theta_LU[:, -1]
        low, high = int(theta_L.argmin()), int(theta_L.argmax())
        caption += (
            f" The scale of the logits θ ended between {rounded(theta_L[low], 2)} (layer {stats.layers_L[low]}) and "
            f"{rounded(theta_L[high], 2)} (layer {stats.layers_L[high]})."
        )
    yield picture(
        "training",
        "Training",
        "The routers over training",
        caption,
        "Lines over the training steps: active experts, threshold p and scale θ, by layer.",
        draw_training,
        training,
        stats.layers_L,
        stats.trained_target,
    )
