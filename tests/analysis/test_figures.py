"""The figures of routing: legible on a phone, whole, and showing what the statistics hold."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text

from dit_moe.analysis.active_experts import (
    draw_active_by_kind,
    draw_active_by_layer,
    draw_active_by_layer_and_time,
    highest_and_lowest,
)
from dit_moe.analysis.drawing import ReportFigure, log_ratios, readable, scale_around, signed, some_layers
from dit_moe.analysis.page import figures_of
from dit_moe.analysis.statistics import RoutingStats
from dit_moe.plotting import PAPER, WIDTH, png_of
from tests.analysis import synthetic

PHONE = 360  # CSS pixels
FEW = synthetic.images()
STATS = {
    "few": FEW,
    "many": synthetic.images(layers=28, experts=64, times=20, classes=1000, side=8, target=8.0),
    "text": synthetic.text(layers=24, experts=64, target=8.0),
}
FIGURES = {f"{name}: {figure.name}": figure for name, stats in STATS.items() for figure in figures_of(stats)}


def named(stats: RoutingStats, name: str) -> ReportFigure:
    (found,) = [figure for figure in figures_of(stats) if figure.name == name]
    return found


@pytest.fixture(scope="module", params=FIGURES.values(), ids=FIGURES)
def figure(request: Any) -> Any:
    drawn = request.param.draw()
    FigureCanvasAgg(drawn)
    drawn.draw_without_rendering()
    return drawn


def texts(figure: Any) -> Iterator[Text]:
    """All that is written, ticks included."""
    for artist in figure.findobj(Text):
        if artist.get_visible() and artist.get_text().strip():
            yield artist


def test_nothing_is_cut_and_every_letter_is_at_least_8_pixels_high_on_a_phone(figure: Any):
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    slack = 0.02  # inches; anti-aliased edges
    assert box.x0 >= -slack and box.y0 >= -slack and box.x1 <= width + slack and box.y1 <= height + slack
    assert width == WIDTH and min(text.get_fontsize() for text in texts(figure)) / 72 * PHONE / WIDTH >= 8


def test_tick_labels_do_not_run_into_each_other(figure: Any):
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label for label in axis.get_ticklabels() if label.get_visible() and label.get_text()]
            low, high = sorted(axis.get_view_interval())
            shown = [
                label.get_window_extent(renderer)
                for label, place in zip(labels, axis.get_ticklocs(), strict=False)
                if low <= place <= high
            ]
            across = sorted((box.x0, box.x1) if axis is axes.xaxis else (box.y0, box.y1) for box in shown)
            overlaps = [a[1] - b[0] for a, b in pairwise(across)]
            assert max(overlaps, default=0) <= 0.25 * 8 / 72 * figure.dpi, [label.get_text() for label in labels]


def test_every_axis_with_ticks_is_named(figure: Any):
    seen = [axes for axes in figure.axes if axes.axison]
    for name, shared in (("xaxis", figure.get_supxlabel()), ("yaxis", figure.get_supylabel())):
        axises = [getattr(axes, name) for axes in seen]
        with_ticks = [axis for axis in axises if any(label.get_text() for label in axis.get_ticklabels())]
        assert not with_ticks or shared or any(axis.label.get_text() for axis in axises)


@pytest.mark.parametrize("name", ["active_per_token", "maps_by_layer", "training"])
def test_dark_figures_are_on_dark_paper_with_light_letters_and_leave_matplotlibs_settings_alone(name: str):
    before = dict(matplotlib.rcParams)
    dark = named(FEW, name).draw(dark=True)
    assert dict(matplotlib.rcParams) == before
    assert to_hex(dark.get_facecolor()) == PAPER[True]
    label = next(text for axes in dark.axes for text in (axes.xaxis.label, axes.yaxis.label) if text.get_text())
    assert sum(matplotlib.colors.to_rgb(label.get_color())) > 2


# ---------------------------------------------------------------------------------------------- which figures there are


def same_for_all(stats: RoutingStats, number: int) -> RoutingStats:
    layers = len(stats.layers_L)
    share = np.zeros_like(stats.share_LE)
    share[:, number - 1] = 1.0
    return replace(stats, active_L=np.full(layers, float(number)), active_std_L=np.zeros(layers), share_LE=share)


def test_names_of_figures_are_taken_once_and_parts_that_are_missing_are_left_out():
    for stats in STATS.values():
        found = [figure.name for figure in figures_of(stats)]  # which files are called by
        assert len(set(found)) == len(found) and all(name.replace("_", "").isalnum() for name in found)
    names = {figure.name for figure in figures_of(synthetic.bare(FEW))}
    assert names == {"active_per_token", "active_by_position", "load", "together"}
    too_few = replace(FEW, images_C=np.full(10, 9))  # images a class
    assert not any(figure.name.endswith("class") for figure in figures_of(too_few))
    assert "class" not in named(too_few, "specialisation").caption


def test_where_every_token_uses_the_same_number_only_which_experts_is_drawn():
    stats = same_for_all(FEW, 2)
    assert stats.fixed_number == 2 and FEW.fixed_number is None
    names = {figure.name for figure in figures_of(stats)}
    assert {"load", "together", "experts_by_time"} <= names
    assert not any(name.startswith(("active", "maps")) for name in names)
    assert "together" not in {figure.name for figure in figures_of(same_for_all(FEW, 1))}  # nothing is shared


def chosen_by_experts() -> RoutingStats:
    """Every image has the same number of experts, and every expert the same load, but tokens differ."""
    loads = {name: np.full_like(getattr(FEW, name), 1 / FEW.experts) for name in ("load_LE", "load_LTE", "load_LCE")}
    active = {name: np.full_like(getattr(FEW, name), 2.0) for name in ("active_L", "active_LT", "active_LC")}
    training = replace(FEW.training, active_LU=np.full_like(FEW.training.active_LU, 2.0), p_LU=None, theta_LU=None)
    return replace(FEW, **loads, **active, training=training)


def test_what_does_not_differ_is_not_drawn():
    names = {figure.name for figure in figures_of(chosen_by_experts())}
    assert not names & {"active_by_layer_and_time", "active_over_time", "active_by_class", "training", "load"}
    assert not any(name.startswith(("experts_by", "specialisation")) for name in names)
    assert {"active_per_token", "active_by_position", "together"} <= names


def never_used() -> RoutingStats:
    load, together = np.zeros((4, 8)), np.zeros((4, 8, 8))
    load[:, 0] = together[:, 0, 0] = 1.0
    return replace(synthetic.bare(FEW), load_LE=load, together_LEE=together)


@pytest.mark.parametrize(
    "stats",
    [
        never_used(),
        synthetic.images(experts=1, target=1.0, layers=2, times=2, classes=2),
        synthetic.images(layers=1, times=2, classes=2),
    ],
    ids=["experts never used", "a single expert", "a single layer"],
)
def test_the_least_there_can_be_is_drawn_and_told(stats: RoutingStats):
    for figure in figures_of(replace(stats, examples=None)):
        figure.draw().draw_without_rendering()
        assert "nan" not in figure.caption and "inf" not in figure.caption


# ---------------------------------------------------------------------------------------------------- what they show


def test_the_middle_of_the_scale_is_the_target_small_differences_stay_pale_and_cells_hold_their_numbers():
    figure = draw_active_by_layer_and_time(np.array([[1.984, 2.03]]), np.array([0.25, 0.75]), [0], (2.0, "target 2"))
    (image,) = figure.axes[0].images
    assert image.norm(2.0) == 0.5 and 0.3 < image.norm(1.984) < 0.5 < image.norm(2.03) < 0.7
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.98", "2.03"]
    assert scale_around(np.array([5.0]), 2.0, 0.1)(5.0) == 1.0
    logs, norm = log_ratios(np.array([0.0, 0.5, 1.0, 2.0, np.nan]))  # zero is at the end of a scale of ratios
    assert norm(0.0) == 0.5 and norm.vmin == -norm.vmax
    assert logs[0] == norm.vmin and np.isnan(logs[4]) and logs[1] == -1.0


def test_shares_are_written_as_percent_and_the_mark_is_at_the_mean():
    figure = draw_active_by_layer(np.array([[0.25, 0.5, 0.25, 0.0]]), np.array([2.0]), [0])
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.texts] == ["25", "50", "25"]
    assert axis.lines[0].get_xdata()[0] == 1  # the column of 2 experts
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2", "3"]
    axis = draw_active_by_layer(np.array([[0.25, 0.5, 0.0, 0.0]]), np.array([1.25]), [0]).axes[0]
    assert [text.get_text() for text in axis.texts] == ["25", "25", "50"]  # the first have none
    assert axis.lines[0].get_xdata()[0] == 1.25
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "1", "2"]


def test_of_many_kinds_the_highest_and_the_lowest_are_drawn():
    active = np.arange(100.0)[None] / 50
    figure = draw_active_by_kind(active, [f"k{i}" for i in range(100)], [0], "Class")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == 40 and labels[0] == "k99" and labels[-1] == "k0"
    assert highest_and_lowest(np.array([3.0, 1.0, 9.0, 5.0, 7.0, 2.0]), 4) == [2, 4, 5, 1]


def test_labels_are_short_plain_text_and_letters_without_a_glyph_are_spelt():
    assert [signed(value) for value in (-0.001, 0.25, -0.25, 1.234)] == ["0", "+.25", "−.25", "+1.2"]
    assert some_layers(28, 6) == [0, 5, 11, 16, 22, 27] and some_layers(4, 6) == [0, 1, 2, 3]
    assert readable("中") == "U+4E2D" and readable("␣the↵") == "␣the↵" and readable("\x07") == "U+0007"
    assert len(readable("sulphur-crested cockatoo, Kakatoe galerita")) <= 24
    figure = draw_active_by_kind(np.array([[1.0, 2.0]]), ["$x^2$", r"$\frac"], [0], "Token")
    figure.draw_without_rendering()
    assert all(not label.get_parse_math() for label in figure.axes[0].get_yticklabels())


def test_places_in_a_text_are_counted_in_tokens_and_those_that_few_reach_are_left_out():
    stats = replace(synthetic.text(), tokens_S=np.where(np.arange(64) < 60, 1000, 10))
    figure = named(stats, "active_by_position")
    line = figure.draw().axes[0].lines[0]
    assert line.get_xdata()[[0, -1]].tolist() == [1.5, 237.5]  # the middles of 4 tokens each
    assert "few windows reach" in figure.caption


def test_chance_is_beside_what_the_classes_make_and_maps_go_from_noise_to_data():
    lines = {line.get_label(): line for line in named(FEW, "specialisation").draw().axes[0].lines}
    assert set(lines) == {"between classes", "classes by chance", "between noise levels"}
    chance, found = lines["classes by chance"], lines["between classes"]
    assert chance.get_color() == found.get_color() and max(chance.get_ydata()) < min(found.get_ydata())
    titles = [axes.get_title() for axes in named(FEW, "maps").draw().axes if axes.get_title()]
    assert titles == [f"t = {t}" for t in ("0.95", "0.77", "0.59", "0.41", "0.23", "0.05")]  # from noise to data


def test_a_figure_does_not_depend_on_the_users_matplotlibrc(monkeypatch):
    monkeypatch.setattr("dit_moe.plotting.DPI", 24)
    figure = named(FEW, "specialisation")
    wanted = png_of(figure.draw())
    theirs = {"text.usetex": True, "font.family": "serif", "savefig.bbox": "tight", "lines.linestyle": ":"}
    with matplotlib.rc_context(theirs):
        assert png_of(figure.draw()) == wanted
