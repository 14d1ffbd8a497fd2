"""Commands side by side: how many, with what, and how they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dit_moe.studies.jobs import TIED, Job, Share, run_jobs, share_machine

ROOT = Path(__file__).parents[2]


def job(folder, name, code):
    return Job(name, [sys.executable, "-c", code], folder / name / "output.txt")


def test_no_more_than_the_share_run_at_a_time_and_all_are_run_in_order(tmp_path):
    note = f"import time; open({str(tmp_path / 'log')!r}, 'a').write('{{}}'); time.sleep(0.3)"
    jobs = [job(tmp_path, str(i), note.replace("{}", str(i))) for i in range(4)]
    most, ended = 0, []

    def look(running):
        nonlocal most
        most = max(most, len(running))

    run_jobs(jobs, Share(2, 1), look, ended.append)
    assert most == 2 and len(ended) == 4
    log = (tmp_path / "log").read_text()
    assert sorted(log[:2]) == ["0", "1"] and sorted(log[2:]) == ["2", "3"]


def test_one_that_fails_does_not_stop_the_others_and_its_last_words_are_known(tmp_path):
    jobs = [job(tmp_path, "bad", "print('so far', flush=True); exit('no more')"), job(tmp_path, "good", "pass")]
    run_jobs(jobs, Share(1, 1))
    assert [each.returncode for each in jobs] == [1, 0]
    assert jobs[0].last_words() == "no more" and jobs[1].last_words() == "it wrote nothing"


def test_output_of_a_second_start_follows_that_of_the_first(tmp_path):
    for word in ("one", "two"):
        run_jobs([job(tmp_path, "a", f"print('{word}')")], Share(1, 1))
    assert (tmp_path / "a" / "output.txt").read_text().split() == ["one", "two"]


def test_what_interrupts_it_ends_the_jobs_by_sigterm_and_waits_for_them_to_save(tmp_path):
    code = f"""
import signal, sys, time
def save(*_):
    time.sleep(0.3); open({str(tmp_path / "saved")!r}, "w").close(); sys.exit(143)
signal.signal(signal.SIGTERM, save); print("ready", flush=True); time.sleep(60)
"""
    jobs = [job(tmp_path, "a", code)]

    def interrupt(running):
        if jobs[0].output.exists() and "ready" in jobs[0].output.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, Share(1, 1), interrupt)
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
