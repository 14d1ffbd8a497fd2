"""Commands side by side: how many, with what, and how they end."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dit_moe.formatting import PlainConsole
from dit_moe.studies import jobs
from dit_moe.studies.jobs import TIED, Job, JobsProgress, Share, gpu_names, run_jobs, share_machine

ROOT = Path(__file__).parents[2]


def job(folder, name, code):
    return Job(name, [sys.executable, "-c", code], folder / name / "output.txt")


@pytest.fixture
def watch(monkeypatch):
    """Call it with a function, which then gets the running jobs at every moment."""
    return lambda look: monkeypatch.setattr(JobsProgress, "update", lambda self, running: look(running))


def test_no_more_than_the_share_run_at_a_time_and_all_are_run_in_order(tmp_path, watch):
    note = f"import time; open({str(tmp_path / 'log')!r}, 'a').write('{{}}'); time.sleep(0.3)"
    waiting = [job(tmp_path, str(i), note.replace("{}", str(i))) for i in range(4)]
    counts = []
    watch(lambda running: counts.append(len(running)))
    assert run_jobs(waiting, Share(2, 1)) == []
    assert max(counts) == 2 and all(each.returncode == 0 for each in waiting)
    log = (tmp_path / "log").read_text()
    assert sorted(log[:2]) == ["0", "1"] and sorted(log[2:]) == ["2", "3"]


def test_one_that_fails_does_not_stop_the_others_and_output_follows_that_of_an_earlier_start(tmp_path):
    bad = job(tmp_path, "bad", "print('so far', flush=True); exit('no more')")
    good = job(tmp_path, "good", "pass")
    assert run_jobs([bad, good], Share(1, 1)) == [bad]
    assert (bad.returncode, good.returncode) == (1, 0)
    assert bad.last_line() == "no more" and good.last_line() == "it wrote nothing"
    run_jobs([job(tmp_path, "bad", "print('again')")], Share(1, 1))
    assert bad.output.read_text().splitlines() == ["so far", "no more", "again"]


def test_what_interrupts_it_ends_the_jobs_by_sigterm_and_waits_for_them_to_save(tmp_path, watch):
    code = f"""
import signal, sys, time
def save(*_):
    time.sleep(0.3); open({str(tmp_path / "saved")!r}, "w").close(); sys.exit(143)
signal.signal(signal.SIGTERM, save); print("ready", flush=True); time.sleep(60)
"""
    patient = job(tmp_path, "a", code)

    def interrupt(running):
        if patient.output.exists() and "ready" in patient.output.read_text():
            raise KeyboardInterrupt

    watch(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_jobs([patient], Share(1, 1))
    assert (tmp_path / "saved").exists()


def test_jobs_end_when_the_program_that_started_them_is_killed_by_kill_9(tmp_path):
    child = "from dit_moe.studies.jobs import end_with_parent; import os, time; end_with_parent(); "
    child += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"""
import sys
from pathlib import Path
from dit_moe.studies.jobs import Job, Share, run_jobs
run_jobs([Job("a", [sys.executable, "-c", {child!r}], Path({str(tmp_path / "out.txt")!r}))], Share(1, 1))
"""
    program = subprocess.Popen([sys.executable, "-c", parent], env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    program.send_signal(signal.SIGKILL)
    program.wait()
    while _alive(pid):
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.05)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_the_machine_is_shared_by_gpus_or_else_by_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert share_machine(39, None, []) == Share(8, 1)
    assert share_machine(39, 2, []) == Share(2, 4)
    assert share_machine(3, None, []) == Share(3, 1)  # threads decide how sums round: not what happens to be missing
    assert share_machine(39, None, ["0", "1"]) == Share(2, 4, ("0", "1"))
    assert share_machine(0, None, []) == Share(1, 1)
    with pytest.raises(ValueError, match="--jobs=3 exceeds the 2 GPUs"):
        share_machine(39, 3, ["0", "1"])


def test_each_slot_has_its_gpu_and_threads(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    environment = Share(2, 4, ("0", "1")).environment(1)
    assert environment["CUDA_VISIBLE_DEVICES"] == "1" and environment["OMP_NUM_THREADS"] == "4" and environment[TIED]
    assert "CUDA_VISIBLE_DEVICES" not in Share(2, 4).environment(1)


@pytest.mark.parametrize(
    ("named", "names"), [(None, ["0", "1"]), ("2,3", ["2", "3"]), ("GPU-a, GPU-b", ["GPU-a", "GPU-b"])]
)
def test_gpus_are_those_that_the_environment_allows(monkeypatch, named, names):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(jobs, "use_cpu", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert gpu_names() == names
    monkeypatch.setattr(jobs, "use_cpu", lambda: True)
    assert gpu_names() == []


# ------------------------------------------------------------------------------------------------- what is seen of it


@pytest.mark.parametrize(
    ("text", "step"),
    [
        (None, 0),
        ("", 0),
        ('{"step": 3}\n{"step": 4, "loss": 1}\n', 4),
        ('{"step": 3}\n{"st', 3),  # a line that is being written
        ('{"step": 3}\n{"step": 4}', 3),
        ('{"step": 3}\nnonsense\n', 3),
        ('{"step": 1}\n' * 1000 + '{"step": 12345}\n', 12345),
    ],
)
def test_a_jobs_step_is_that_of_its_logs_last_whole_line(tmp_path, text, step):
    log = tmp_path / "log.jsonl"
    if text is not None:
        log.write_text(text)
    assert Job("topk/0", [], tmp_path / "output.txt", log=log, steps=10).step() == step


def two_jobs(folder):
    return [Job(f"topk/{i}", [], folder / f"{i}.txt", log=folder / f"{i}.jsonl", steps=10) for i in range(2)]


@pytest.mark.parametrize(("at_a_time", "left"), [(1, ", about 1:40 left"), (2, "")])
def test_elsewhere_than_on_a_terminal_every_start_and_end_is_a_line(tmp_path, capsys, monkeypatch, at_a_time, left):
    now = [0.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])
    running = first, second = two_jobs(tmp_path)
    with JobsProgress(running, at_a_time) as progress:
        for job in running[:at_a_time]:
            progress.started(job)
        first.returncode, now[0] = 0, 100.0
        progress.ended(first)
        for job in running[at_a_time:]:
            progress.started(job)
        second.returncode, now[0] = 1, 205.0
        second.output.write_text("it was\nthe end\n")
        progress.ended(second)
    lines = capsys.readouterr().err.splitlines()
    starts = [f"topk/{i} begins, {i + 1} of 2; what it says goes to {tmp_path / f'{i}.txt'}" for i in range(2)]
    ends = [f"[1/2] topk/0 done (1:40{left})", "[2/2] topk/1 FAILED: the end (3:25)"]
    assert lines == ([starts[0], ends[0], starts[1], ends[1]] if at_a_time == 1 else starts + ends)


def test_elsewhere_than_on_a_terminal_a_line_a_minute_says_where_the_jobs_are(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])
    running = two_jobs(tmp_path)
    running[0].log.write_text('{"step": 7}\n')
    running[1].log.write_text('{"step": 10}\n')
    with JobsProgress(running, 2) as progress:
        for now[0] in (0.2, 59.8, 60.2, 90.0, 119.9):
            progress.update(running)
    assert capsys.readouterr().err == "topk/0: training, step 7/10; topk/1: scoring, step 10/10 (1:00)\n"


@pytest.mark.parametrize(("returncode", "left"), [(0, ", about 1:40 left"), (1, "")])
def test_the_time_left_is_that_of_the_rounds_left_of_jobs_that_do_not_fail(
    tmp_path, capsys, monkeypatch, returncode, left
):
    now = [0.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])
    three = [Job(name, [], tmp_path / name, returncode=returncode) for name in "abc"]
    with JobsProgress(three, 2) as progress:
        progress.started(three[0])
        progress.started(three[1])
        now[0] = 100.0
        progress.ended(three[0])
    assert capsys.readouterr().err.endswith(f" (1:40{left})\n")


def test_on_a_terminal_jobs_that_run_are_shown_with_their_steps(tmp_path, monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(jobs, "PlainConsole", lambda **how: PlainConsole(file=file, force_terminal=True, width=80))
    running = two_jobs(tmp_path)
    running[0].log.write_text('{"step": 7}\n')
    running[1].log.write_text('{"step": 10}\n')
    with JobsProgress(running, 2) as progress:
        progress.update(running)
        progress.bars.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert re.search(r"topk/0: training .* 7/10", shown) and re.search(r"topk/1: scoring .* 10/10", shown)
