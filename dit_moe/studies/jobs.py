"""Several commands side by side, each with its share of the machine."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Self

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from dit_moe.distributed import cores, use_cpu
from dit_moe.formatting import PlainConsole

POLL = 0.2  # seconds
SHOWN_EVERY = 60.0  # seconds between two lines on the jobs that run, where there is no terminal
TIED = "DIT_MOE_ENDS_WITH_PARENT"  # set for a command that is to end when its standard input does
TAIL = 4096  # bytes of a log that hold its last line's beginning


@dataclass
class Job:
    """A command and the file that its output goes to."""

    name: str
    command: Sequence[str]
    output: Path
    log: Path | None = None  # whose last line has the step at which it is …
    steps: int = 0  # … of so many
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    returncode: int | None = None  # None: it has not ended

    def last_line(self) -> str:
        """The last line that it wrote."""
        lines = self.output.read_text(encoding="utf-8", errors="replace").split("\n") if self.output.exists() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")

    def step(self) -> int:
        """That of the log's last whole line; 0 where there is none."""
        if self.log is None or not self.log.exists():
            return 0
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - TAIL))
            found = re.findall(rb'"step": (\d+)[^\n]*\n', file.read())
        return int(found[-1]) if found else 0


# ------------------------------------------------------------------------------------------------- sharing the machine


@dataclass(frozen=True)
class Share:
    """What each of the jobs that run at a time may use."""

    jobs: int
    threads: int
    gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them; empty: none, or that variable is left alone

    def environment(self, slot: int) -> dict[str, str]:
        threads = {"OMP_NUM_THREADS": str(self.threads), TIED: "1"}
        return {**os.environ, **threads, **({"CUDA_VISIBLE_DEVICES": self.gpus[slot]} if self.gpus else {})}


def gpu_names() -> list[str]:
    """Of the GPUs that may be used, as CUDA_VISIBLE_DEVICES is to name them; none where the CPU is to be used."""
    if use_cpu():
        return []
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(count)) if named is None else (name.strip() for name in named.split(","))
    return list(names)[:count]


def share_machine(missing: int, jobs: int | None, gpus: Sequence[str]) -> Share:
    """`jobs` at a time: as many as there are GPUs, or without any, cores. Each gets a GPU, or its part of the cores.

    ValueError if more jobs than GPUs are asked for.
    """
    if gpus and jobs is not None and jobs > len(gpus):
        raise ValueError(f"--jobs={jobs} exceeds the {len(gpus)} GPUs of this machine; lower it")
    wanted = jobs or (len(gpus) if gpus else cores())
    taken = max(1, min(wanted, missing))
    return Share(taken, max(1, cores() // wanted), tuple(gpus[:taken]))


# ------------------------------------------------------------------------------------------------------------- running


def run_jobs(jobs: Sequence[Job], share: Share) -> list[Job]:
    """Run all, in order, `share.jobs` at a time; returns those that failed. One that fails does not stop the others.

    Whatever ends this function early, or kills this process, ends the jobs too, as SIGTERM does: they save themselves.
    """
    waiting, slots = list(jobs), dict[int, Job]()
    with JobsProgress(jobs, share.jobs) as progress:
        try:
            while waiting or slots:
                for slot in range(share.jobs):
                    if slot not in slots and waiting:
                        slots[slot] = waiting.pop(0)
                        _start(slots[slot], share.environment(slot))
                        progress.started(slots[slot])
                for slot, job in list(slots.items()):
                    assert job.process is not None
                    job.returncode = job.process.poll()
                    if job.returncode is not None:
                        del slots[slot]
                        progress.ended(job)
                progress.update(list(slots.values()))
                time.sleep(POLL)
        finally:
            _stop(list(slots.values()))
    return [job for job in jobs if job.returncode]


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


class JobsProgress:
    """On stderr a line for each job that has ended; for those that run, bars on a terminal, elsewhere lines, too."""

    def __init__(self, jobs: Sequence[Job], at_a_time: int) -> None:
        self.number, self.at_a_time = len(jobs), at_a_time
        self.start, self.starts = time.monotonic(), dict[str, float]()  # of all, and of those that run
        self.due = self.start + SHOWN_EVERY
        self.seconds: list[float] = []  # of those that have ended well
        self.over = 0  # how many have ended
        self.console = PlainConsole(stderr=True, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
        shown = self.console.is_terminal
        self.bars = Progress(*columns, console=self.console, disable=not shown, transient=True)
        self.tasks = {job.name: self.bars.add_task(job.name, total=job.steps, visible=False) for job in jobs}

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def started(self, job: Job) -> None:
        self.starts[job.name] = time.monotonic()
        if not self.console.is_terminal:
            begun = self.over + len(self.starts)
            self.console.print(f"{job.name} begins, {begun} of {self.number}; what it says goes to {job.output}")

    def update(self, running: Sequence[Job]) -> None:
        now = time.monotonic()
        if not self.console.is_terminal and now < self.due:
            return
        self.due = now + SHOWN_EVERY
        shown = []
        for job in running:
            step = job.step()
            doing = f"{job.name}: {'scoring' if step >= job.steps else 'training'}"
            self.bars.update(self.tasks[job.name], visible=True, completed=step, description=doing)
            shown.append(f"{doing}, step {step}/{job.steps}")
        if shown and not self.console.is_terminal:
            self.console.print(f"{'; '.join(shown)} ({_minutes(now - self.start)})")

    def ended(self, job: Job) -> None:
        self.bars.update(self.tasks[job.name], visible=False)
        took = time.monotonic() - self.starts.pop(job.name)
        self.seconds += [took] if job.returncode == 0 else []
        outcome = "done" if job.returncode == 0 else f"FAILED: {job.last_line()}"
        self.over, elapsed = self.over + 1, time.monotonic() - self.start
        rounds = math.ceil(self.number / self.at_a_time)
        left = fmean(self.seconds) * rounds - elapsed if self.seconds else 0.0  # if the others take as long
        times = _minutes(elapsed) + (f", about {_minutes(left)} left" if self.over < self.number and left >= 1 else "")
        self.console.print(f"[{self.over}/{self.number}] {job.name} {outcome} ({times})")


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
