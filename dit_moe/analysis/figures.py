"""Which figures a network's routing has, in the order of the report; and the one of the routers over training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from dit_moe.analysis.active_experts import (
    class_and_token_figures,
    layer_figures,
    noise_level_figures,
    position_figures,
)
from dit_moe.analysis.drawing import ReportFigure
from dit_moe.analysis.expert_use import expert_use_figures
from dit_moe.analysis.image_examples import image_example_figures
from dit_moe.analysis.statistics import RoutingStats
from dit_moe.formatting import rounded
from dit_moe.training.curves import draw_training


def figures_of(stats: RoutingStats) -> list[ReportFigure]:
    """All figures that these statistics allow.

    Where every token uses the same number of experts, as with top-k, those of that number are left out.
    """
    groups: list[Callable[[RoutingStats], Iterator[ReportFigure]]] = [expert_use_figures, training_figures]
    if stats.fixed_number is None:
        by_number = [layer_figures, noise_level_figures, image_example_figures, position_figures]
        groups = [*by_number, class_and_token_figures, *groups]
    return [figure for group in groups for figure in group(stats)]


def training_figures(stats: RoutingStats) -> Iterator[ReportFigure]:
    training, target = stats.training, stats.trained_target
    if training is None or len(training.step_U) < 2:
        return
    if stats.fixed_number is not None and training.p_LU is None and training.theta_LU is None:
        return
    late_U = training.active_U[-max(1, len(training.active_U) // 4) :]
    caption = (
        f"Over the last quarter of training, tokens used {late_U.mean():.3f} ± {rounded(late_U.std(), 3)} experts "
        f"({target})."
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
    yield ReportFigure(
        name="training",
        section="Training",
        title="The routers over training",
        caption=caption,
        alt="Lines over the training steps: active experts, threshold p and scale θ, by layer.",
        draw=partial(draw_training, training, stats.layers_L, (target.mean, str(target))),
    )
