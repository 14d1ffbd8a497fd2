"""A bar of images, for commands that work through a set of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dit_moe.processes import join_processes


@contextmanager
def images_bar(doing: str, total: int) -> Iterator[Callable[[int], None]]:
    """On the main process; yields what to call with the number of images done since; ends in a line off a terminal."""
    console = Console(stderr=True)
    if not join_processes().is_main_process:
        yield lambda count: None
        return
    rate = TextColumn("{task.fields[rate]:,.0f} images/s")
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    start, done = time.perf_counter(), 0
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("", total=total, rate=0)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress.update(bar, completed=min(done, total), rate=done / (time.perf_counter() - start))

        yield advance
    if not console.is_terminal and done:
        seconds = time.perf_counter() - start
        print(f"{doing}: {min(done, total):,} images, {done / seconds:,.0f} a second", file=sys.stderr)
