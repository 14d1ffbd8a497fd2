"""What one sees of a study while it runs."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from dit_moe.studies.jobs import Job
from dit_moe.studies.progress import StudyProgress, step_of


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("", 0),
        ('{"step": 3, "loss": 1}\n', 3),
        ('{"step": 3}\n{"step": 4}\n', 4),
        ('{"step": 3}\n{"st', 3),  # a line that is being written
        ('{"step": 3}\n{"step": 4}', 3),
        ('{"step": 3}\nnonsense\n', 3),
        ('{"step": 1}\n' * 1000 + '{"step": 12345}\n', 12345),
    ],
)
def test_the_step_is_that_of_the_logs_last_whole_line(tmp_path, text, step):
    log = tmp_path / "log.jsonl"
    log.write_text(text)
    assert step_of(log) == step


def test_without_a_log_it_is_0(tmp_path):
    assert step_of(tmp_path / "log.jsonl") == 0


@pytest.fixture
def progress(tmp_path):
    experiment = SimpleNamespace(train=SimpleNamespace(steps=10))
    runs = [SimpleNamespace(name=f"topk/{i}", folder=tmp_path / str(i), experiment=experiment) for i in range(2)]
    for run in runs:
        run.folder.mkdir()
    return StudyProgress(runs)


def job(name, folder, returncode):
    return Job(name, [], folder / "output.txt", returncode=returncode)


def test_elsewhere_than_on_a_terminal_every_end_is_a_line(progress, tmp_path, capsys):
    with progress:
        progress.ended(job("topk/0", tmp_path, 0))
        (tmp_path / "output.txt").write_text("it was\nthe end\n")
        progress.ended(job("topk/1", tmp_path, 1))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("[1/2] topk/0 done (0:00, about 0:0") and first.endswith(" left)")
    assert second.startswith("[2/2] topk/1 FAILED: the end (0:0")


def test_on_a_terminal_runs_under_way_are_shown_with_their_steps(progress, tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    progress.console = progress.live.console = console
    (tmp_path / "0" / "log.jsonl").write_text('{"step": 7}\n')
    (tmp_path / "1" / "log.jsonl").write_text('{"step": 10}\n')
    progress.update([job("topk/0", tmp_path, None), job("topk/1", tmp_path, None)])
    console.print(progress.live.renderable)
    shown = console.file.getvalue()
    assert "0 of 2 runs done" in shown and "topk/0: step 7 of 10" in shown and "topk/1: scoring" in shown
