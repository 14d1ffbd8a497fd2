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

from dit_moe.analysis.axes import around, log_ratios, readable, signed
from dit_moe.analysis.draw_active import draw_kinds, draw_layers_and_times, draw_spread
from dit_moe.analysis.gallery import figures_of, fixed_number
from dit_moe.analysis.picture import Picture
from dit_moe.analysis.stats import RoutingStats, Target
from dit_moe.plotting import PAPER, WIDTH
from tests.analysis import synthetic

PHONE = 360  # CSS pixels
STATS = {
    "few": synthetic.images(),
    "many": synthetic.images(layers=28, experts=64, times=20, classes=1000, side=16, target=8.0),
    "one layer": synthetic.images(layers=1, times=2, classes=2),
    "text": synthetic.text(),
    "much text": synthetic.text(layers=24, experts=64, target=8.0),
}
PICTURES = {f"{name}: {picture.name}": picture for name, stats in STATS.items() for picture in figures_of(stats)}


@pytest.fixture(scope="module", params=PICTURES.values(), ids=PICTURES)
def figure(request: Any) -> Any:
    drawn = request.param.draw(False)
    FigureCanvasAgg(drawn)
    drawn.draw_without_rendering()
    return drawn


def texts(figure: Any) -> Iterator[Text]:
    """All that is written, ticks included."""
    for artist in figure.findobj(Text):
        if artist.get_visible() and artist.get_text().strip():
            yield artist


def test_nothing_is_cut(figure: Any):
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    slack = 0.02  # inches; anti-aliased edges
    assert box.x0 >= -slack and box.y0 >= -slack and box.x1 <= width + slack and box.y1 <= height + slack


def test_every_letter_is_at_least_8_pixels_high_on_a_phone(figure: Any):
    assert figure.get_size_inches()[0] == WIDTH
    smallest = min(text.get_fontsize() for text in texts(figure))
    assert smallest / 72 * PHONE / WIDTH >= 8


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


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES)
def test_a_caption_has_numbers_and_every_picture_is_described(picture: Picture):
    assert any(letter.isdigit() for letter in picture.caption) and picture.alt.endswith(".") and picture.title
    assert "nan" not in picture.caption and "inf" not in picture.caption


@pytest.mark.parametrize("picture", figures_of(STATS["few"]), ids=lambda picture: picture.name)
def test_dark_pictures_are_on_dark_paper_with_light_letters(picture: Picture):
    dark = picture.draw(True)
    assert to_hex(dark.get_facecolor()) == PAPER[True]
    label = next(text for axes in dark.axes for text in (axes.xaxis.label, axes.yaxis.label) if text.get_text())
    assert sum(matplotlib.colors.to_rgb(label.get_color())) > 2


def test_drawing_leaves_the_settings_of_matplotlib_alone():
    before = dict(matplotlib.rcParams)
    figures_of(STATS["few"])[0].draw(True)
    assert dict(matplotlib.rcParams) == before


def test_names_of_pictures_are_files_and_each_is_taken_once():
    for stats in STATS.values():
        names = [picture.name for picture in figures_of(stats)]
        assert len(set(names)) == len(names) and all(name.replace("_", "").isalnum() for name in names)


def test_parts_that_are_missing_are_left_out():
    names = {picture.name for picture in figures_of(synthetic.bare(STATS["few"]))}
    assert names == {"active_per_token", "active_by_position", "load", "together"}


def same_for_all(stats: RoutingStats, number: int) -> RoutingStats:
    layers = len(stats.layers_L)
    share = np.zeros_like(stats.share_LE)
    share[:, number - 1] = 1.0
    return replace(stats, active_L=np.full(layers, float(number)), active_std_L=np.zeros(layers), share_LE=share)


def test_where_every_token_uses_the_same_number_only_which_experts_is_drawn():
    stats = same_for_all(STATS["few"], 2)
    assert fixed_number(stats) == 2 and fixed_number(STATS["few"]) is None
    assert not any(picture.name.startswith(("active", "maps")) for picture in figures_of(stats))
    assert {"load", "together", "experts_by_time"} <= {picture.name for picture in figures_of(stats)}


def test_with_one_expert_a_token_nobody_shares():
    assert "together" not in {picture.name for picture in figures_of(same_for_all(STATS["few"], 1))}


def test_experts_never_used_are_drawn_and_told_without_fuss():
    load = np.zeros((4, 8))
    load[:, 0] = 1.0
    together = np.zeros((4, 8, 8))
    together[:, 0, 0] = 1.0
    stats = replace(synthetic.bare(STATS["few"]), load_LE=load, together_LEE=together)
    for picture in figures_of(stats):
        picture.draw(False).draw_without_rendering()
        assert "nan" not in picture.caption


def test_the_middle_of_the_scale_is_the_target_and_small_differences_stay_pale():
    figure = draw_layers_and_times(np.array([[1.98, 2.03]]), np.array([0.25, 0.75]), [0], Target(2.0))
    (image,) = figure.axes[0].images
    assert image.norm(2.0) == 0.5 and 0.3 < image.norm(1.98) < 0.5 < image.norm(2.03) < 0.7
    assert around(np.array([5.0]), 2.0, 0.1)(5.0) == 1.0


def test_numbers_in_the_cells_are_those_given():
    active = np.array([[1.234, 2.345], [3.0, 1.0]])
    figure = draw_layers_and_times(active, np.array([0.25, 0.75]), [0, 1], Target(2.0))
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.23", "2.35", "3.00", "1.00"]


def test_shares_are_written_as_percent_and_the_mark_is_at_the_mean():
    figure = draw_spread(np.array([[0.25, 0.5, 0.25, 0.0]]), np.array([2.0]), [0])
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.texts] == ["25", "50", "25"]
    assert axis.lines[0].get_xdata()[0] == 1  # the column of 2 experts
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2", "3"]


def test_of_many_kinds_the_highest_and_the_lowest_are_drawn():
    active = np.arange(100.0)[None] / 50
    figure = draw_kinds(active, [f"k{i}" for i in range(100)], [0], "Class")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == 40 and labels[0] == "k99" and labels[-1] == "k0"


def test_a_label_of_dollars_is_no_mathematics():
    figure = draw_kinds(np.array([[1.0, 2.0]]), ["$x^2$", r"$\frac"], [0], "Token")
    figure.draw_without_rendering()
    assert all(not label.get_parse_math() for label in figure.axes[0].get_yticklabels())


def test_labels_are_short_and_letters_without_a_glyph_are_spelt():
    assert readable("中") == "U+4E2D" and readable("␣the↵") == "␣the↵" and readable("\x07") == "U+0007"
    assert len(readable("sulphur-crested cockatoo, Kakatoe galerita")) <= 24


def test_a_deviation_of_nothing_has_no_sign():
    assert [signed(value) for value in (-0.001, 0.25, -0.25, 1.234)] == ["0", "+.25", "−.25", "+1.2"]


def test_places_in_a_text_are_counted_in_tokens_and_those_that_few_reach_are_left_out():
    stats = synthetic.text()
    stats = replace(stats, tokens_S=np.where(np.arange(64) < 60, 1000, 10))
    (picture,) = [p for p in figures_of(stats) if p.name == "active_by_position"]
    line = picture.draw(False).axes[0].lines[0]
    assert line.get_xdata()[[0, -1]].tolist() == [1.5, 237.5]  # the middles of 4 tokens each
    assert "few windows reach" in picture.caption


def test_chance_is_dashed_beside_what_the_classes_make():
    (picture,) = [p for p in figures_of(STATS["few"]) if p.name == "specialisation"]
    lines = {line.get_label(): line for line in picture.draw(False).axes[0].lines}
    assert set(lines) == {"between classes", "classes by chance", "between noise levels"}
    chance, found = lines["classes by chance"], lines["between classes"]
    assert chance.get_color() == found.get_color() and max(chance.get_ydata()) < min(found.get_ydata())


def test_of_too_few_images_a_class_nothing_is_drawn_of_classes():
    few = replace(STATS["few"], images_C=np.full(10, 9))
    names = {picture.name for picture in figures_of(few)}
    assert "specialisation" in names and not any(name.endswith("class") for name in names)
    assert not any("class" in p.caption for p in figures_of(few) if p.name == "specialisation")


def test_a_single_expert_is_drawn_and_balanced():
    stats = synthetic.images(experts=1, target=1.0)
    assert stats.balance_L.tolist() == [1.0] * 4
    for picture in figures_of(stats):
        picture.draw(False).draw_without_rendering()
        assert "nan" not in picture.caption


def test_scales_of_ratios_are_symmetric_and_zero_is_at_their_end():
    logs, norm = log_ratios(np.array([0.0, 0.5, 1.0, 2.0, np.nan]))
    assert norm(0.0) == 0.5 and norm.vmin == -norm.vmax
    assert logs[0] == norm.vmin and np.isnan(logs[4]) and logs[1] == -1.0


def test_images_are_drawn_from_noise_to_data():
    (picture,) = [p for p in figures_of(STATS["few"]) if p.name == "maps"]
    titles = [axes.get_title() for axes in picture.draw(False).axes if axes.get_title()]
    assert titles == ["t = 0.95", "t = 0.77", "t = 0.59", "t = 0.41", "t = 0.23", "t = 0.05"]
