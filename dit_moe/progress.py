"""A bar of what is done, for commands that work through many images or much text."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dit_moe.distributed import join_processes
from dit_moe.formatting import speed


@contextmanager
def work_bar(doing: str, total: float | None, unit: str) -> Iterator[Callable[[float], None]]:
    """On the main process; yields what to call with the number of `unit` done since; ends in a line off a terminal."""
    console = Console(stderr=True)
    if not join_processes().is_main_process:
        yield lambda count: None
        return
    rate = TextColumn("{task.fields[rate]} " + unit + "/s")
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    start, done = time.perf_counter(), 0.0
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("", total=total, rate="0")

        def advance(count: float) -> None:
            nonlocal done
            done = min(done + count, math.inf if total is None else total)
            progress.update(bar, completed=done, rate=speed(done / (time.perf_counter() - start)))

        yield advance
    if not console.is_terminal and done:
        seconds = time.perf_counter() - start
        print(f"{doing}: {speed(done)} {unit}, {speed(done / seconds)} a second", file=sys.stderr)


images_bar = partial(work_bar, unit="images")
