"""Several commands side by side, each with its share of the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

POLL = 0.2  # seconds
TIED = "DIT_MOE_ENDS_WITH_PARENT"  # set for a command that is to end when its standard input does


@dataclass
class Job:
    """A command and the file that its output goes to."""

    name: str
    command: Sequence[str]
    output: Path
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    returncode: int | None = None  # None: it has not ended

    def last_words(self) -> str:
        """The last line that it wrote."""
        lines = self.output.read_text(errors="replace").split("\n") if self.output.exists() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")


@dataclass(frozen=True)
class Share:
    """What each of the jobs that run at a time may use."""

    jobs: int
    threads: int
    gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them; empty: none, or that variable is left alone

    def environment(self, slot: int) -> dict[str, str]:
        threads = {"OMP_NUM_THREADS": str(self.threads), TIED: "1"}
        return {**os.environ, **threads, **({"CUDA_VISIBLE_DEVICES": self.gpus[slot]} if self.gpus else {})}


def share_machine(missing: int, jobs: int | None, gpus: Sequence[str]) -> Share:
    """`jobs` at a time: as many as there are GPUs, or without any, cores. Each gets a GPU, or its part of the cores.

    ValueError if more jobs than GPUs are asked for.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if gpus and jobs is not None and jobs > len(gpus):
        raise ValueError(f"--jobs={jobs} exceeds the {len(gpus)} GPUs of this machine; lower it")
    wanted = jobs or (len(gpus) if gpus else cores)
    taken = max(1, min(wanted, missing))
    return Share(taken, max(1, cores // wanted), tuple(gpus[:taken]))


def run_jobs(
    waiting: Sequence[Job],
    share: Share,
    on_change: Callable[[list[Job]], None] = lambda running: None,
    on_end: Callable[[Job], None] = lambda job: None,
) -> None:
    """Run all, in order, `share.jobs` at a time. One that fails does not stop the others.

    Whatever ends this function early, or kills this process, ends the jobs too, as SIGTERM does: they save themselves.

    Args:
        on_change: called every moment with those that run.
        on_end: called with each that has ended.
    """
    left, slots = list(waiting), dict[int, Job]()
    try:
        while left or slots:
            for slot in range(share.jobs):
                if slot not in slots and left:
                    slots[slot] = left.pop(0)
                    _start(slots[slot], share.environment(slot))
            for slot, job in list(slots.items()):
                assert job.process is not None
                job.returncode = job.process.poll()
                if job.returncode is not None:
                    del slots[slot]
                    on_end(job)
            on_change(list(slots.values()))
            time.sleep(POLL)
    finally:
        _stop(list(slots.values()))


def _start(job: Job, environment: dict[str, str]) -> None:
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with job.output.open("ab") as output:
        # A Ctrl-C at the terminal reaches it once, through `_stop`, and not by itself, too.
        job.process = subprocess.Popen(
            job.command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _stop(jobs: Sequence[Job]) -> None:
    """Have them save themselves, and wait for that."""
    processes = [job.process for job in jobs if job.process is not None]
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait()


def end_with_parent() -> None:
    """In a job: SIGTERM to this process once the one that started it is gone, however that ended."""

    def wait() -> None:
        while os.read(0, 1024):  # not through sys.stdin, whose lock would stop the interpreter from ending
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ.pop(TIED, None):
        threading.Thread(target=wait, daemon=True).start()
