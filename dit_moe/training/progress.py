"""What a person sees of a run on stderr: a bar on a terminal; elsewhere a line per log interval, but few a minute."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from dit_moe.rounding import rounded


@dataclass(frozen=True)
class Unit:
    """What the log counts: a name in the plural, and how many of it make a row of data."""

    name: str
    per_row: int = 1


PAUSE = 5.0  # seconds between two lines where there is no terminal


class Progress:
    """Shows how far a run of `steps` steps is. `shown=False` keeps other processes than the first quiet."""

    def __init__(self, steps: int, step: int, unit: str, shown: bool) -> None:
        self._steps, self._unit, self._said = steps, unit, -PAUSE
        self._console = Console(stderr=True, quiet=not shown, soft_wrap=True, highlight=False)
        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._bar = Bar(*columns, console=self._console, disable=not (shown and self._console.is_terminal))
        self._task = self._bar.add_task("", total=steps, completed=step)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, step: int) -> None:
        """Call after every step."""
        self._bar.update(self._task, completed=step)

    def line(self, line: dict[str, Any]) -> None:
        """Call with every line of the log."""
        rate = line[f"{self._unit}_per_s"]
        rows_left = (self._steps - line["step"]) * line[self._unit] / line["step"]
        loss, left = rounded(line["loss"], 4, 3), _clock(rows_left / rate)
        shown = [f"loss {loss}", f"{rate:.4g} {self._unit}/s", f"{left} left"]
        if line.get("p") is not None:
            shown.append(f"p {rounded(line['p'], 3, 2)}")
        if line.get("active") is not None:
            shown.append(f"active {line['active']:.2f}")
        text = "  ".join(shown)
        self._bar.update(self._task, description=text)
        due = time.monotonic() - self._said >= PAUSE or line["step"] == self._steps
        if due and not self._console.is_terminal:
            self._said = time.monotonic()
            self.say(f"step {line['step']}/{self._steps}  {text}")

    def say(self, message: str) -> None:
        """A message of its own line."""
        self._console.print(message, markup=False)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
