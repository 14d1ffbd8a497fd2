"""`dit-moe dial` measures one checkpoint at several targets, goes on where it stopped, and refuses what cannot be."""

import json
import shutil
from functools import partial

import pytest

from dit_moe.evaluation.heldout_loss import HeldoutConfig
from dit_moe.moe import MoEConfig
from dit_moe.moe.routers.dtopp import DTopPConfig
from dit_moe.moe.routers.topk import TopKConfig
from dit_moe.plotting import png_of
from dit_moe.studies import compute_budget
from dit_moe.studies.compute_budget import default_targets
from dit_moe.studies.compute_budget_figure import draw_dial, to_markdown
from tests.cli.conftest import CONFIG, SMALL, cli


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(compute_budget, "HeldoutConfig", partial(HeldoutConfig, draws=1, images=40))


@pytest.fixture(scope="module")
def topk_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "topk"
    assert cli("train", CONFIG, "--run", folder, *SMALL, "model.moe.router=topk") == 0
    return folder


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dense"
    assert cli("train", CONFIG, "--run", folder, *SMALL, "model={name: DiT-custom/4}", "model.moe=null") == 0
    return folder


@pytest.fixture(scope="module")
def topp_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "topp"
    assert cli("train", CONFIG, "--run", folder, *SMALL, "model.moe.router={name: topp, p: 0.8}") == 0
    return folder


def result(folder):
    return json.loads((folder / "dial.json").read_text())["runs"]


def points_of(folder, measure="loss"):
    """Targets and points by entry, in the order in which they were measured."""
    return [[point["target"] for point in entry["points"]] for entry in result(folder) if entry["measure"] == measure]


@pytest.fixture
def measured(monkeypatch):
    """What is measured, as it happens."""
    found, measure = [], compute_budget.ImageSubject.measure

    def noted(self, target, names):
        found.append((target, *names))
        return measure(self, target, names)

    monkeypatch.setattr(compute_budget.ImageSubject, "measure", noted)
    return found


def test_from_half_to_twice_the_target_compute_grows_and_is_what_was_asked_for(
    finished_run, topk_run, tmp_path, capsys
):
    before = {path: path.read_bytes() for path in finished_run.rglob("*.safetensors")}
    assert (
        cli("dial", finished_run, topk_run, "--out", tmp_path, "count=100", "--seeds", "2") == 0
    )  # 200 images: a mean within 2 %
    entries = result(tmp_path)
    assert [(entry["router"], entry["measure"]) for entry in entries] == [
        *(("dtopp", measure) for measure in ("loss", "distance")),
        *(("topk", measure) for measure in ("loss", "distance")),
    ]
    for entry in entries:
        trained, *points = entry["points"]
        wanted = [1, 1.2599, 1.5874, 2, 2.5198, 3.1748, 4] if entry["router"] == "dtopp" else [1, 3, 4]
        assert trained["target"] is None and [point["target"] for point in points] == wanted
        flops = [point["flops"] for point in points]
        assert flops == sorted(set(flops))
        assert points[0]["device"] == "cpu" and "torch" in points[0]["versions"]
        if entry["measure"] == "distance":
            for point in points:
                assert point["active"] == pytest.approx(point["target"], rel=0.03)
                assert point["std"] > 0 and point["value"] > point["floor"] > 0
    assert all(path.read_bytes() == content for path, content in before.items())
    table = capsys.readouterr().out
    assert table == (tmp_path / "dial.md").read_text() and table.count("\n") == 2 + 8 + 4
    assert "| DTop-p | **as trained** |" in table and "| top-k | **as trained** |" in table
    assert (tmp_path / "dial.png").read_bytes()[:4] == b"\x89PNG"


def test_points_that_are_there_are_kept_and_other_settings_measure_anew(a_run, monkeypatch, measured):
    measure = compute_budget.ImageSubject.measure

    def interrupted(self, target, names):
        if target == 3:
            raise KeyboardInterrupt
        return measure(self, target, names)

    words, out = ("dial", a_run, "--targets", "1,3", "--no-metric"), a_run / "dial"
    with monkeypatch.context() as patch:
        patch.setattr(compute_budget.ImageSubject, "measure", interrupted)
        assert cli(*words) == 130
    assert points_of(out) == [[None, 1]]
    measured.clear()
    assert cli(*words) == 0
    assert measured == [(3, "loss")]
    first = result(out)
    assert cli("dial", a_run, "--targets", "3", "--no-metric", "batch_size=7") == 0
    assert result(out) == first  # what was not asked for stays
    assert "| 1 |" not in (out / "dial.md").read_text()  # and is not shown
    measured.clear()
    assert cli("dial", a_run, "--targets", "3", "--no-metric", "sampler.steps=3") == 0
    assert measured == [(None, "loss"), (3, "loss")]
    assert points_of(out) == [[None, 1, 3], [None, 3]]  # beside each other
    shutil.rmtree(a_run / "checkpoints" / "step_00000004")
    assert cli("dial", a_run, "--targets", "3", "--no-metric", "sampler.steps=3") == 0
    assert points_of(out) == [[None, 1, 3], [None, 3], [None, 3]]


def test_each_measure_keeps_its_points_by_its_own_settings(a_run, measured):
    words, out = ("dial", a_run, "--targets", "1", "count=20"), a_run / "dial"
    assert cli(*words, "--seeds", "1") == 0
    assert cli(*words, "--no-metric") == 0  # throws no distance away
    assert cli(*words, "--seeds", "1") == 0
    assert measured == [(None, "loss", "distance"), (1, "loss", "distance")]
    assert cli(*words, "--seeds", "2") == 0
    assert cli(*words, "--seeds", "1", "--images", "30", "--draws", "2") == 0
    assert measured[2:] == [(None, "distance"), (1, "distance"), (None, "loss"), (1, "loss")]
    assert points_of(out, "distance") == points_of(out, "loss") == [[None, 1], [None, 1]]


def test_other_runs_stay_in_the_file_and_one_that_is_named_twice_is_one(a_run, topk_run, tmp_path):
    out = tmp_path / "out"
    assert cli("dial", a_run, "--targets", "1", "--no-metric", "--out", out) == 0
    assert cli("dial", topk_run, f"{topk_run}/", "--targets", "1,2", "--no-metric", "--out", out) == 0
    assert [entry["router"] for entry in result(out)] == ["dtopp", "topk"]
    assert points_of(out) == [[None, 1], [None, 1]]  # k = 2 is as trained
    assert (out / "dial.md").read_text().count("\n") == 2 + 2


def test_a_fixed_threshold_is_turned_around_what_it_makes_of_the_tokens(topp_run, tmp_path):
    assert cli("dial", topp_run, "--no-metric", "--out", tmp_path) == 0
    ((first, *targets),) = points_of(tmp_path)
    trained = result(tmp_path)[0]["points"][0]["active"]
    assert first is None and trained > 2.5
    assert targets[0] == pytest.approx(trained / 2, abs=1e-4) and targets[-1] == 4
    assert round(trained, 4) in targets


def test_a_run_without_held_out_images_is_measured_on_the_others_and_that_is_said(a_run, monkeypatch, capsys):
    opened = compute_budget.open_split

    def none_held_out(data, split):
        return opened(data, "train")[0], "train (nothing was held out)"

    monkeypatch.setattr(compute_budget, "open_split", none_held_out)
    assert cli("dial", a_run, "--targets", "1", "--no-metric") == 0
    assert "the loss is of the images in train (nothing was held out)" in capsys.readouterr().err
    assert result(a_run / "dial")[0]["identity"]["split"] == "train (nothing was held out)"


def test_as_trained_and_at_another_target_the_loss_is_the_one_of_that_dial(a_run):
    assert cli("dial", a_run, "--targets", "2,4", "--no-metric") == 0
    (entry,) = result(a_run / "dial")
    trained, two, four = entry["points"]
    assert entry["measure"] == "loss" and trained["thresholds"] != two["thresholds"]
    assert two["thresholds"][0] < four["thresholds"][0]
    assert two["value"] != four["value"]
    assert two["active"] < four["active"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--targets", "1,x"], "--targets 1,x must be numbers with commas between them"),
        (["--targets", "9"], "target=9 is outside what the router allows, 1 to 4"),
        (["target=3"], "target is what the command itself changes; name the values with --targets"),
        (["sample.vary=time"], "vary is what the command itself changes"),
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--draws", "0"], "--draws 0 must be at least 1"),
        (["--seeds", "2", "--no-metric"], "--seeds is for samples, which --no-metric leaves out"),
        (["sampler.stepz=3"], "sample.sampler.stepz is not a known key"),
    ],
)
def test_bad_words_are_refused_before_anything_is_measured(finished_run, tmp_path, words, message, capsys):
    assert cli("dial", finished_run, "--out", tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_dense_run_is_refused(dense_run, capsys):
    assert cli("dial", dense_run) == 2
    assert "model is dense; its compute cannot be changed" in capsys.readouterr().err


def test_a_damaged_result_is_not_written_over(a_run, capsys):
    (a_run / "dial").mkdir()
    (a_run / "dial" / "dial.json").write_text("{")
    assert cli("dial", a_run, "--no-metric") == 2
    assert "dial.json is damaged; move it away" in capsys.readouterr().err


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
    figure = draw_dial([entry("dtopp"), entry("topk")])
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["DTop-p", "top-k", "as trained"]
    same = draw_dial([entry("dtopp", "a"), entry("dtopp", "b")])
    assert [text.get_text() for text in same.axes[0].get_legend().get_texts()][:2] == ["a", "b"]
    assert "MFLOPs" in figure.axes[0].get_xlabel()


def test_a_single_point_and_many_runs_are_drawn_light_and_dark():
    runs = [entry("dtopp", f"run {i}", targets=(None,)) for i in range(9)]
    assert png_of(draw_dial(runs))[:4] == png_of(draw_dial(runs, dark=True))[:4] == b"\x89PNG"


def test_the_table_goes_from_the_cheapest_to_the_dearest_and_shows_spread_and_units():
    table = " ".join(to_markdown([entry("dtopp", std=0.1)]).split())
    assert "| run | **as trained** | 0.5 ± 0.1 | 2.000 | 20 M |" in table
    assert table.index("| run | 1 |") < table.index("as trained") < table.index("| run | 4 |")
