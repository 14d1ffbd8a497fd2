"""The figures of a study: which ones there are numbers for, and their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dit_moe.plotting import save_figure
from dit_moe.studies.figures_quality import draw_differences, draw_loss_vs_flops, draw_quality_vs_active
from dit_moe.studies.figures_routing import draw_active_by_layer, draw_active_over_training, draw_p_over_training
from dit_moe.studies.statistics import summaries

Draw = Callable[..., Any]  # (dark: bool = False) → Figure
FIGURES: dict[str, Draw] = {
    "loss_vs_flops": draw_loss_vs_flops,
    "difference_to_baseline": draw_differences,
    "active_over_training": draw_active_over_training,
    "p_over_training": draw_p_over_training,
    "active_by_layer": draw_active_by_layer,
    "quality_vs_active": draw_quality_vs_active,
}


def figures_of(results: Mapping[str, Any]) -> list[tuple[str, Draw]]:
    """Name and function of each figure that there are numbers for; call one with `dark` or without for a `Figure`."""
    rows = summaries(results)
    runs = [run for row in rows for run in row.runs]
    curves = [run["curves"] for run in runs]
    wanted = {
        "loss_vs_flops": runs,
        "difference_to_baseline": any(row.difference for row in rows),
        "active_over_training": any(curve["active"] for curve in curves),
        "p_over_training": any(curve["p"] for curve in curves),
        "active_by_layer": any(run["active_layers"] for run in runs),
        "quality_vs_active": any(row.active for row in rows),
    }
    return [(name, _of(draw, results)) for name, draw in FIGURES.items() if wanted[name]]


def save_figures(results: Mapping[str, Any], folder: Path) -> None:
    """Each as a PNG; a figure of an earlier state of the study that is no longer drawn is removed."""
    drawn = dict(figures_of(results))
    for name in FIGURES:
        if name in drawn:
            save_figure(drawn[name](), folder / f"{name}.png")
        else:
            (folder / f"{name}.png").unlink(missing_ok=True)


def _of(draw: Draw, results: Mapping[str, Any]) -> Draw:
    return lambda dark=False: draw(results, dark=dark)
