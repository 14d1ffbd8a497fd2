"""The figures of a study: what is in them, and that nothing is cut or hidden."""

import itertools
import warnings
from functools import cache

import numpy as np
import pytest

from dit_moe.plotting import LINES, WIDTH
from dit_moe.studies.compare import FIGURES, save_figures
from dit_moe.studies.figures import spread_apart, styles_of
from tests.studies.examples import ROWS, results

PHONE = 360  # CSS pixels
WHOLE = "13 variants, 3 seeds"
STUDIES = {
    WHOLE: results(),
    "one seed, no metric, 28 layers": results(seeds=1, metric=None, layers=28),
    "two variants of a language model": results(
        ["topk", "dtopp"], unit="token", metric=None, loss={"label": "held-out loss", "unit": "nats/token"}
    ),
}
LABELS = {row[1] for row in ROWS} | {f"{row[1]} (ddpm)" for row in ROWS}


@cache
def figure_of(study, name, dark=False):
    return drawn(STUDIES[study], name, dark)


def drawn(made, name, dark=False):
    figure = FIGURES[name](made, dark=dark)
    if figure is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a layout that does not fit only warns
            figure.draw_without_rendering()
    return figure


def pieces_of(figure):
    """Every visible piece of text with letters in it."""
    from matplotlib.text import Text

    return figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible() and artist.get_text())


def texts(figure):
    """What is written, and its box in pixels."""
    return [(piece.get_text(), piece.get_window_extent()) for piece in pieces_of(figure)]


CASES = [(study, name, False) for study in STUDIES for name in FIGURES] + [(WHOLE, "loss_vs_flops", True)]


@pytest.mark.parametrize(("study", "name", "dark"), CASES)
def test_no_text_is_cut_or_too_small_on_a_phone_or_hides_the_name_of_a_variant(study, name, dark):
    figure = figure_of(study, name, dark)
    require_legible(figure)
    boxes = [(text, box) for text, box in texts(figure) if text in LABELS]
    assert boxes or name == "difference_to_baseline"
    if study == WHOLE and name in ("loss_vs_flops", "quality_vs_active"):
        assert {row[1] for row in ROWS} <= {text for text, _ in boxes}  # every variant is named
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        hidden = max(width, 0) * max(height, 0) / min(a.width * a.height, b.width * b.height)
        assert hidden < 0.15, f"{one} and {other}"  # boxes are higher than most letters


def require_legible(figure):
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox()  # of all that is drawn
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, str(box)
    assert width == WIDTH
    assert min(piece.get_fontsize() for piece in pieces_of(figure)) / 72 * PHONE / WIDTH >= 8  # pixels


def test_axes_have_labels_with_units_and_each_objective_its_own():
    labels = {name: [axis.get_xlabel() + axis.get_ylabel() for axis in figure_of(WHOLE, name).axes] for name in FIGURES}
    assert labels["loss_vs_flops"][0] == "held-out loss\n(flow)"
    assert labels["loss_vs_flops"][-1] == "forward MFLOPs per image, measuredheld-out loss\n(ddpm)"
    assert "active experts per token" in labels["active_over_training"][0]
    assert "optimizer steps" in labels["p_over_training"][0]
    assert "%" in labels["difference_to_baseline"][-1]
    assert "lower is better" in labels["quality_vs_active"][-1]


def test_variants_of_nearly_equal_flops_are_near_and_numbers_on_axes_are_not_to_be_added_to_something():
    figure = figure_of("two variants of a language model", "loss_vs_flops")
    assert {axis.get_offset_text().get_text() for one in figure.axes for axis in (one.xaxis, one.yaxis)} == {""}
    low, high = figure.axes[0].get_xlim()
    assert high - low > 0.09 * high


def test_a_layer_without_active_experts_is_drawn():
    made = results(["dtopp"])
    for run in made.variants[0].runs:
        run.active_layers = [0.0, 4.0, 2.0, 2.0]
    with np.errstate(all="raise"):
        assert "0.00" in [text for text, _ in texts(drawn(made, "active_by_layer"))]


@pytest.mark.parametrize(
    ("names", "gone", "shown"),
    [
        (["dense"], [], {"loss_vs_flops"}),
        (["topk", "dtopp"], [0, 1], set()),
        (["dense", "topk", "dtopp", "topk-ddpm", "dtopp-ddpm"], [1, 4], set(FIGURES) - {"difference_to_baseline"}),
    ],
    ids=["dense", "no runs", "a baseline and one of two of an objective without runs"],
)
def test_what_there_are_no_numbers_for_is_not_drawn_and_the_rest_is(names, gone, shown):
    made = results(names)
    for variant in gone:
        made.variants[variant].runs = []
    assert {name for name in FIGURES if drawn(made, name) is not None} == shown


def test_runs_whose_logs_differ_in_length_are_drawn_together():
    made = results(["topk", "dtopp"])
    curves = made.variants[1].runs[0].curves
    for key in curves:
        curves[key] = curves[key] and curves[key][:7]
    assert drawn(made, "active_over_training") and drawn(made, "p_over_training")


def test_a_variant_looks_alike_in_every_study_of_its_routers_and_unlike_any_other():
    styles, fewer = (styles_of(results(names).variants) for names in (None, ["dense", "dtopp"]))
    assert len({(style.colour, style.marker) for style in styles.values()}) == 13
    assert (styles["dtopp"].colour, styles["dtopp"].marker) == (fewer["dtopp"].colour, fewer["dtopp"].marker)
    assert {style.colour for style in styles.values()} <= set(LINES)
    assert len({style.line for name, style in styles.items() if name.startswith("dtopp")}) == 5


def test_a_router_that_is_not_built_in_gets_a_colour_of_its_own():
    made = results(["dense", "topk", "dtopp"])
    made.variants[2].router = "expert_choice"
    assert len({style.colour for style in styles_of(made.variants).values()}) == 3


def test_the_band_of_active_experts_is_the_spread_over_seeds_and_steps():
    made = results(["dtopp"])
    for run, level in zip(made.variants[0].runs, (1.9, 2.0, 2.1), strict=True):
        steps = len(run.curves["step"])
        run.curves |= {"active": [level] * steps, "active_std": [0.3] * steps}
    axis = drawn(made, "active_over_training").axes[0]
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((2 - np.hypot(0.3, 0.1), 2 + np.hypot(0.3, 0.1)))


def test_each_seed_of_a_controlled_router_is_seen_off_its_target():
    made = results(["dtopp", "topk", "dtopp-no-drn"])
    for run, level in zip(made.variants[1].runs, (1.9, 2.0, 2.1), strict=True):
        run.curves["active"] = [level] * len(run.curves["step"])
    _, dtopp, without = drawn(made, "active_over_training").axes
    ends = sorted(line.get_ydata()[-1] for line in dtopp.lines if len(line.get_ydata()) > 2)
    assert ends == pytest.approx([-5, 0, 5])
    assert dtopp.get_ylim() == without.get_ylim() == pytest.approx((-5.5, 5.5))


def test_a_figure_that_is_not_drawn_any_more_is_removed(tmp_path):
    other = tmp_path / "other.png"
    for path in (tmp_path / "p_over_training.png", other):
        path.write_bytes(b"old")
    save_figures(results(["dense"]), tmp_path)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "loss_vs_flops.png", other]


@pytest.mark.parametrize(
    ("places", "gap", "apart"),
    [
        ([0.1, 0.5, 0.5, 0.5, 0.9], 0.1, [0.1, 0.4, 0.5, 0.6, 0.9]),
        ([0.98, 0.99, 1.0], 0.2, [0.6, 0.8, 1.0]),  # within the axes
        ([0.0, 0.01], 0.2, [0.0, 0.2]),
        ([], 0.2, []),
    ],
)
def test_names_move_apart_as_little_as_they_can(places, gap, apart):
    assert spread_apart(np.array(places), gap) == pytest.approx(apart)
