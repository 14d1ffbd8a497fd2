"""Which compute budgets are measured by default, and how what was measured is shown."""

import pytest

from dit_moe.moe import MoEConfig
from dit_moe.moe.routers.dtopp import DTopPConfig
from dit_moe.moe.routers.topk import TopKConfig
from dit_moe.plotting import png_of
from dit_moe.studies.compute_budget import draw_compute_budget, to_markdown
from dit_moe.studies.compute_budget_runs import default_targets


@pytest.mark.parametrize(
    ("moe", "targets"),
    [
        (MoEConfig(experts=8, target=2.0, router=TopKConfig()), [1, 2, 3, 4]),
        (MoEConfig(experts=8, target=1.0, router=TopKConfig()), [1, 2]),
        (MoEConfig(experts=4, target=3.0, router=TopKConfig()), [2, 3, 4]),
        (MoEConfig(experts=64, target=8.0), [4, 5.0397, 6.3496, 8, 10.0794, 12.6992, 16]),
        (MoEConfig(experts=4, target=4.0), [2, 2.2449, 2.5198, 2.8284, 3.1748, 3.5636, 4]),
        (MoEConfig(experts=8, target=2.123456), [1.0617, 1.3377, 1.6854, 2.123456, 2.6754, 3.3708, 4.2469]),
    ],
)
def test_default_targets_are_what_the_routers_allow(moe, targets):
    assert default_targets(moe, moe.target) == targets


def test_the_trained_target_is_among_the_default_ones_whatever_bounds_them():
    limited = MoEConfig(experts=8, target=2.0, router=DTopPConfig(min_experts=1, max_experts=3))
    found = default_targets(limited, 2.0)
    assert 2.0 in found and max(found) == 3


def entry(router, name="run", targets=(None, 1.0, 4.0), **more):
    def measure(target):
        used = target or 2.0
        return {"value": 1 / used, "active": used, "flops": 1e7 * used, **more}

    points = [{"target": target, "measures": {"loss": measure(target)}} for target in targets]
    return {"name": name, "router": router, "points": points}


def test_runs_are_told_apart_by_router_or_by_name_and_each_is_a_line():
    figure = draw_compute_budget([entry("dtopp"), entry("topk")])
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["DTop-p", "top-k", "as trained"]
    same = draw_compute_budget([entry("dtopp", "a"), entry("dtopp", "b")])
    assert [text.get_text() for text in same.axes[0].get_legend().get_texts()][:2] == ["a", "b"]
    assert "MFLOPs" in figure.axes[0].get_xlabel()


def test_a_single_point_and_many_runs_are_drawn_light_and_dark():
    runs = [entry("dtopp", f"run {i}", targets=(None,)) for i in range(9)]
    assert png_of(draw_compute_budget(runs))[:4] == png_of(draw_compute_budget(runs, dark=True))[:4] == b"\x89PNG"


def test_the_table_goes_from_the_cheapest_to_the_dearest_and_shows_spread_and_units():
    table = to_markdown([entry("dtopp", std=0.1)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[1] for row in rows] == ["1", "**as trained**", "4"]
    assert rows[1] == ["run", "**as trained**", "0.5 ± 0.1", "2.000", "20 M"]
