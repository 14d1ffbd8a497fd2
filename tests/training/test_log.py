import json

import pytest

from dit_moe.progress import TrainingBar
from dit_moe.training.log import JsonLines
from dit_moe.training.trackers import tracked


def test_lines_past_the_resumed_step_and_half_a_line_are_cut(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 5}\n{"step": 10}\n{"step": 15}\n{"step": 2')
    log = JsonLines(path, 10)
    log.write({"step": 15, "loss": 1.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [5, 10, 15]
    assert list(tmp_path.iterdir()) == [path]


def test_good_lines_behind_a_damaged_one_are_kept_and_the_damaged_one_put_aside(tmp_path, capsys):
    path, damaged = tmp_path / "log.jsonl", bytes(20) + b"\xff\n"
    path.write_bytes(b'{"step": 5}\n' + damaged + b'{"step": 15}\n{"step"\n{"step": 20}\n{"step": 25}\n')
    JsonLines(path, 20)
    assert path.read_text() == '{"step": 5}\n{"step": 15}\n{"step": 20}\n'
    assert (tmp_path / "log.jsonl.damaged").read_bytes() == damaged + b'{"step"\n'
    assert capsys.readouterr().err == f"warning: {path} has 2 lines that cannot be read, now in log.jsonl.damaged\n"
    JsonLines(path, 20)
    assert capsys.readouterr().err == ""


def test_a_log_that_needs_no_cut_is_not_rewritten(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 5}\n')
    inode = path.stat().st_ino
    JsonLines(path, 5)
    assert path.stat().st_ino == inode


def test_lines_can_be_read_while_the_run_goes_on(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl", 0)
    log.write({"step": 1})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'


def test_trackers_get_each_number_under_a_name_that_says_what_it_is_of():
    layers = {"active": [1.5, 2.5], "p": []}
    line = {"step": 1, "p": None, "active": 2.0, "layers": layers, "loss": 0.5, "images_per_s": 3.0, "changes": [{}]}
    assert tracked(line) == {
        "train/loss": 0.5,
        "train/images_per_second": 3.0,
        "router/active": 2.0,
        "router/active/layer_00": 1.5,
        "router/active/layer_01": 2.5,
    }


LINE = {"step": 250, "images": 8000, "seconds": 200.4, "loss": 0.125, "images_per_s": 40.0, "p": 0.5, "active": 2.01}


def test_progress_without_a_terminal_is_one_line_per_interval_on_stderr(capsys, monkeypatch):
    with TrainingBar(steps=1000, step=0, unit="images", shown=True) as progress:
        progress.step(250)
        progress.line(LINE)
        progress.line(LINE | {"step": 251})  # at once: too soon to be worth a line
        monkeypatch.setattr("dit_moe.progress.PAUSE", 0.0)
        progress.line(LINE)
    out, err = capsys.readouterr()
    assert out == ""
    start, end = "step 250/1000  loss 0.1250  40 images/s  0:03:20 elapsed", "  p 0.500  active 2.01"
    # No time left as long as the rate is one of the start. 750 steps of 32 images at 40 images/s are 10 minutes.
    assert err.splitlines() == [start + end, f"{start}, 0:10:00 left{end}"]


def test_the_time_left_counts_the_samples_and_checkpoints_to_come(capsys, monkeypatch):
    monkeypatch.setattr("dit_moe.progress.PAUSE", 0.0)
    progress = TrainingBar(steps=1000, step=0, unit="images", shown=True)
    progress.line(LINE)  # of the start
    progress.beside("samples", 250, 30.0)
    progress.beside("samples", 250, 60.0)  # the last one counts
    progress.beside("checkpoint", 400, 5.0)
    for step in (500, 501, 1000):
        progress.line(LINE | {"step": step, "images": 32 * step})
    # 500 steps at 0.8 s, samples at 500, 750 and 1000, a checkpoint at 800; samples at 750 and 1000; those at 1000.
    left = [line.split(" elapsed, ")[1].split(" left")[0] for line in capsys.readouterr().err.splitlines()[1:]]
    assert left == ["0:09:45", "0:08:44", "0:01:00"]


@pytest.mark.parametrize("line", [LINE | {"p": None, "active": None}, {k: LINE[k] for k in list(LINE)[:5]}])
def test_a_model_without_threshold_or_experts_shows_none(capsys, line):
    TrainingBar(steps=1000, step=0, unit="images", shown=True).line(line)
    assert capsys.readouterr().err.endswith("elapsed\n")


def test_other_processes_than_the_first_are_quiet(capsys):
    with TrainingBar(steps=1000, step=0, unit="images", shown=False) as progress:
        progress.line(LINE)
        progress.message("hello")
    assert capsys.readouterr().err == ""
