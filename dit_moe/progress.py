"""A bar of what is done, for commands that work through many images or much text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dit_moe.distributed import join_processes
from dit_moe.formatting import PlainConsole, speed, tell


@contextmanager
def work_bar(doing: str, total: float | None, unit: str) -> Iterator[Callable[[float], None]]:
    """On the main process; yields what to call with the number of `unit` done since; ends in a line off a terminal."""
    console = PlainConsole(stderr=True)
    if not join_processes().is_main_process:
        yield lambda count: None
        return
    named, rate = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[rate]} " + unit + "/s")
    columns = (named, BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    start, done = time.perf_counter(), 0.0
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task(doing, total=total, rate="0")

        def advance(count: float) -> None:
            nonlocal done
            done = min(done + count, math.inf if total is None else total)
            progress.update(bar, completed=done, rate=speed(done / (time.perf_counter() - start)))

        yield advance
    if not console.is_terminal and done:
        seconds = time.perf_counter() - start
        tell(f"{doing}: {speed(done)} {unit}, {speed(done / seconds)} a second")


images_bar = partial(work_bar, unit="images")
