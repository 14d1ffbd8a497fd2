"""What one sees of a study while its runs are under way."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from dit_moe.studies.jobs import Job
from dit_moe.studies.plan import PlannedRun

TAIL = 4096  # bytes of a log that hold its last line's beginning


class StudyProgress:
    """On a terminal the runs under way with their steps; elsewhere a line for each that has ended."""

    def __init__(self, runs: Sequence[PlannedRun]) -> None:
        self.runs = {run.name: run for run in runs}
        self.done, self.start = 0, time.monotonic()
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, transient=True, refresh_per_second=2)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def update(self, running: Sequence[Job]) -> None:
        if not self.console.is_terminal:
            return
        lines = [Text(f"{self.done} of {len(self.runs)} runs done, {self._elapsed()}{self._left()}")]
        for job in running:
            run = self.runs[job.name]
            steps = run.experiment.train.steps
            at = step_of(run.folder / "log.jsonl")
            lines.append(Text(f"  {job.name}: " + ("scoring" if at >= steps else f"step {at} of {steps}")))
        self.live.update(Group(*lines))

    def ended(self, job: Job) -> None:
        self.done += 1
        outcome = "done" if job.returncode == 0 else f"FAILED: {job.last_words()}"
        line = f"[{self.done}/{len(self.runs)}] {job.name} {outcome} ({self._elapsed()}{self._left()})"
        if self.console.is_terminal:
            self.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _elapsed(self) -> str:
        return _minutes(time.monotonic() - self.start)

    def _left(self) -> str:
        left = len(self.runs) - self.done
        if not self.done or not left:
            return ""
        return f", about {_minutes((time.monotonic() - self.start) / self.done * left)} left"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def step_of(log: Path) -> int:
    """The step of a log's last whole line; 0 where there is none."""
    if not log.exists():
        return 0
    with log.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - TAIL))
        lines = file.read().split(b"\n")
    for line in reversed(lines[:-1]):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0
