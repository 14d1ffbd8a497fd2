"""What the curves of a run's log show."""

import json
import threading

import numpy as np
import pytest

from dit_moe.training.curves import _means, draw_training, router_curves
from dit_moe.training.curves_of_runs import CurvesPicture, RunLog, _names, curves_png, draw_runs
from dit_moe.training.log import read_log


def log_line(step, **layers):
    layers = {"active": [1.0 + step, 3.0 + step], **layers}
    return {"step": step, "loss": 1 / step, "active": 2.0 + step, "layers": layers}


def test_a_log_is_read_line_by_line_and_a_damaged_one_is_named(tmp_path):
    assert read_log(tmp_path / "gone.jsonl") == []
    (tmp_path / "damaged.jsonl").write_bytes(b'{"step": 5}\n\xff\x00\n{"step": 15}\n')
    with pytest.raises(ValueError, match=r"damaged.jsonl: line 2 is not in UTF-8; take it out, or let"):
        read_log(tmp_path / "damaged.jsonl")


def test_curves_of_routers_are_the_log_up_to_a_step():
    log = [log_line(step, p=[0.1 * step, 0.2], theta=[1.0, 1.1]) for step in (1, 2, 3, 4)]
    found = router_curves(log, 3)
    assert found.step_U.tolist() == [1, 2, 3] and found.active_U.tolist() == [3, 4, 5]
    assert found.active_LU.tolist() == [[2, 3, 4], [4, 5, 6]]
    assert found.p_LU[0] == pytest.approx([0.1, 0.2, 0.3]) and found.theta_LU.shape == (2, 3)
    assert len(router_curves(log).step_U) == 4
    bare = router_curves([log_line(1)])
    assert bare.p_LU is None and bare.theta_LU is None
    assert router_curves([]) is router_curves(log, 0) is router_curves([{"step": 1, "loss": 2.0}]) is None


def test_long_curves_become_means_of_windows_and_short_ones_are_left_alone():
    curve = np.random.default_rng(2).standard_normal((3, 960))
    (short,) = _means([curve], most=240)
    assert short.shape == (3, 240) and short.mean(1) == pytest.approx(curve.mean(1))
    assert (_means([curve[:, :100]], most=240)[0] == curve[:, :100]).all()
    assert _means([np.arange(5.0)], most=3)[0].tolist() == [0.5, 2.5, 4.0]  # the last may be of fewer


def test_there_is_a_panel_for_the_loss_each_number_of_the_routers_and_each_distance_with_a_floor(tmp_path):
    log = [log_line(step, p=[0.5, 0.5], theta=[1.0, 1.1]) for step in range(1, 9)]
    lines = [{"step": s, "fd_n100": 100 / s, "fd_n100_floor": 2.0, "active": 2.0, "heldout_loss": 1.0} for s in (4, 8)]
    figure = draw_training(router_curves(log), [0, 1], (2.0, "target 2"), log, lines)
    assert {axis.get_ylabel(): axis.get_legend_handles_labels()[1] for axis in figure.axes} == {
        "Loss": ["each logged step", "held out"],
        "Active experts per token": ["layer 0", "layer 1", "mean of layers", "target 2"],
        "Threshold p": ["all layers"],
        "Scale of the logits θ": ["layer 0", "layer 1"],
        "fd_n100": ["fd_n100", "floor"],
    }
    dense = [{"step": step, "loss": 1 / step, "lr": 0.1, "grad_norm": 2.0, "images_per_s": 3.0} for step in range(1, 9)]
    logged = ["Learning rate", "Gradient norm", "Images per second"]
    for evaluations in ([], lines, [line | {"fd_n100": None} for line in lines]):
        figure = RunLog(dense, evaluations, None).draw()
        shown = ["Loss", *(["fd_n100"] if evaluations else []), *logged]
        assert [axis.get_ylabel() for axis in figure.axes] == shown


def test_several_runs_are_a_line_each_in_one_picture_by_the_names_in_which_they_differ(tmp_path):
    log = [log_line(step, p=[0.5, 0.5]) | {"lr": 0.1, "p": 0.5} for step in range(1, 9)]
    dense = [{"step": step, "loss": 1 / step, "lr": 0.1} for step in range(1, 5)]
    held_out = [{"step": 4, "heldout_loss": 1.0}]
    names = _names([tmp_path / "study" / "topk" / "seed-0", tmp_path / "study" / "dense" / "seed-0"])
    assert names == ["topk/seed-0", "dense/seed-0"]
    figure = draw_runs(dict(zip(names, (RunLog(log, [], 2.0), RunLog(dense, held_out, None)), strict=True)))
    panels = {axis.get_ylabel(): axis for axis in figure.axes}
    assert list(panels) == ["Loss", "Active experts per token", "Threshold p", "Learning rate"]
    assert panels["Loss"].get_legend_handles_labels()[1] == [*names, "held out"]
    assert panels["Learning rate"].get_legend_handles_labels()[1] == names
    assert panels["Threshold p"].get_legend_handles_labels()[1] == names[:1]


def test_the_picture_is_drawn_while_the_run_goes_on_and_no_step_waits_for_it(tmp_path, monkeypatch):
    drawing, go_on = threading.Event(), threading.Event()

    def draw(runs):
        drawing.set()
        assert go_on.wait(10)
        return b"png"

    monkeypatch.setattr("dit_moe.training.curves_of_runs.FIRST", 0.0)
    monkeypatch.setattr("dit_moe.training.curves_of_runs.SHARE", 1e-9)
    monkeypatch.setattr("dit_moe.training.curves_of_runs.curves_png", draw)
    (tmp_path / "log.jsonl").write_text("")
    picture = CurvesPicture(tmp_path)
    assert picture.update() is None and drawing.wait(10)
    assert picture.update() is None, "it is still being drawn"
    go_on.set()
    picture._thread.join()
    assert (tmp_path / "curves.png").read_bytes() == b"png"
    assert (picture.update(), picture.update()) == (b"png", None)
    assert picture.finish() == b"png"
    assert CurvesPicture(tmp_path).finish() is None, "nothing was logged since"


def test_a_picture_that_cannot_be_drawn_is_a_warning_and_ends_no_training(tmp_path, monkeypatch, capsys):
    def draw(runs):
        raise RuntimeError("no font")

    monkeypatch.setattr("dit_moe.training.curves_of_runs.curves_png", draw)
    (tmp_path / "log.jsonl").write_text("")
    assert CurvesPicture(tmp_path).finish() is None
    assert capsys.readouterr().err == "warning: no curves.png: RuntimeError: no font\n"


@pytest.mark.parametrize("name", ["nope", "."])
def test_a_folder_without_a_log_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=r"(does not exist.*|has no log.jsonl.*); name a run folder"):
        curves_png([tmp_path / name])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"step": -1}, "has step=-1 must be from 0"),
        ({"loss": None}, "has loss=None must be a number"),
        ({"loss": float("nan")}, "has loss=nan must be a finite number"),
        ({"images_per_s": 0}, "has images_per_s=0.0 must be from"),
        ({"p": 10**15}, "has p=1000000000000000.0 must be from 0 to 1"),
        ({"grad_norm": "1"}, "has other things than numbers"),
        ({"layers": {"p": [0.5]}}, "has numbers of 1 layers, where the first has those of 2"),
    ],
)
def test_a_forged_line_of_a_log_is_named(tmp_path, change, problem):
    line = {"step": 1, "loss": 2.0, "images_per_s": 3.0, "layers": {"p": [0.5, 0.5]}}
    path = tmp_path / "log.jsonl"
    path.write_text(f"{json.dumps(line)}\n{json.dumps(line | change)}\n")
    with pytest.raises(ValueError, match=f"log.jsonl: line 2 {problem}.*; take it out, or let the run go on"):
        read_log(path)
