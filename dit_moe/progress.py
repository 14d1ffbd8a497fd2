"""How far work is, on stderr: training, or a command that works through many images or much text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dit_moe.distributed import join_processes
from dit_moe.formatting import PlainConsole, rounded, speed, tell

PAUSE = 5.0  # seconds between two lines of a training where there is no terminal
FIRST_AFTER, AT_LEAST_EVERY = 1.0, 20.0  # seconds of other work there; what is done sooner has one line, at its end


@contextmanager
def work_bar(doing: str, total: float | None, unit: str) -> Iterator[Callable[[float], None]]:
    """On the main process; yields what to call with the number of `unit` done since.

    Off a terminal, long work says soon what it is, and now and then how far; all work ends in a line.
    """
    console = PlainConsole(stderr=True)
    if not join_processes().is_main_process:
        yield lambda count: None
        return
    named, rate = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[rate]} " + unit + "/s")
    columns = (named, BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    start, done = time.perf_counter(), 0.0
    due = start + FIRST_AFTER
    of = "" if total is None else f" of {total:,.0f}"
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task(doing, total=total, rate="0")

        def advance(count: float) -> None:
            nonlocal done, due
            done, now = min(done + count, math.inf if total is None else total), time.perf_counter()
            rate = speed(done / (now - start))
            progress.update(bar, completed=done, rate=rate)
            if now >= due and not console.is_terminal and done != total:
                due = now + AT_LEAST_EVERY
                known = f", {rate} a second" if done >= 1 else ""  # it may be busy with the first one, or compile
                tell(f"{doing}: {int(done):,}{of} {unit}{known}")

        yield advance
    if not console.is_terminal and done:
        seconds = time.perf_counter() - start
        tell(f"{doing}: {speed(done)} {unit}, {speed(done / seconds)} a second")


images_bar = partial(work_bar, unit="images")


class TrainingBar:
    """How far a run is: a bar on a terminal, elsewhere a line per log interval, but few a minute.

    `shown=False` keeps other processes than the first quiet.
    """

    def __init__(self, steps: int, step: int, unit: str, shown: bool) -> None:
        self._steps, self._unit, self._printed, self._started = steps, unit, -PAUSE, False
        self._beside: dict[str, tuple[int, float]] = {}  # work beside the steps: how often it comes, its last seconds
        self._console = PlainConsole(stderr=True, quiet=not shown, soft_wrap=True)
        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=self._console, disable=not (shown and self._console.is_terminal))
        self._task = self._bar.add_task("", total=steps, completed=step)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def step(self, step: int) -> None:
        """Call after every step."""
        self._bar.update(self._task, completed=step)

    def beside(self, work: str, every: int, seconds: float) -> None:
        """Call after work that comes every so many steps beside them: the time left counts what is to come of it."""
        self._beside[work] = every, seconds

    def line(self, line: dict[str, Any]) -> None:
        """Call with every line of the log, before the work beside the steps that is due then."""
        rate, step = line[f"{self._unit}_per_s"], line["step"]
        left = (self._steps - step) * line[self._unit] / step / rate
        left += sum((self._steps // every - (step - 1) // every) * seconds for every, seconds in self._beside.values())
        times = f"{timedelta(seconds=round(line['seconds']))} elapsed"
        if self._started:  # the first line's rate is of the start
            times += f", {timedelta(seconds=round(left))} left"
        self._started = True
        shown = [f"loss {rounded(line['loss'], 4, 3)}", f"{rate:.4g} {self._unit}/s", times]
        if line.get("p") is not None:
            shown.append(f"p {rounded(line['p'], 3, 2)}")
        if line.get("active") is not None:
            shown.append(f"active {line['active']:.2f}")
        if line.get("dropped"):
            shown.append(f"dropped {line['dropped']:.2g}")
        text = "  ".join(shown)
        self._bar.update(self._task, description=text)
        due = time.monotonic() - self._printed >= PAUSE or line["step"] == self._steps
        if due and not self._console.is_terminal:
            self._printed = time.monotonic()
            self.message(f"step {line['step']}/{self._steps}  {text}")

    def message(self, text: str) -> None:
        self._console.print(text)
