"""The curves of run folders as pictures: of one run, also while it trains, and of several runs in one."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from dit_moe.checkpoint import CONFIG
from dit_moe.config import Tree, parse
from dit_moe.files import missing, write_atomically
from dit_moe.formatting import tell
from dit_moe.plotting import DASHED, INK, LINES, labels_above, png_of, styled
from dit_moe.training.curves import ACTIVE, LOGGED, draw_training, measured_in, router_curves, smoothed, stacked
from dit_moe.training.log import read_log

CURVES = "curves.png"  # in the run folder
FIRST = 120.0  # seconds of training before the first picture
SHARE = 0.005  # of the time of a training that drawing may take


@dataclass(frozen=True)
class RunLog:
    """What a run folder says of its training."""

    log: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    target: float | None  # active experts that the routers are held to

    @classmethod
    def read(cls, run: Path) -> Self:
        """ValueError if there is nothing to read yet, or if it cannot be read."""
        log = read_log(run / "log.jsonl")
        if not log:
            problem = f"{run} has no log.jsonl with what was trained" if run.exists() else missing(run)
            raise ValueError(f"{problem}; name a run folder (runs/NAME)")
        settings: Tree = parse((run / CONFIG).read_text(encoding="utf-8")) if (run / CONFIG).is_file() else {}
        moe = (settings.get("model") or {}).get("moe")
        return cls(log, read_log(run / "evaluations.jsonl"), moe and moe.get("target"))

    def draw(self, *, dark: bool = False) -> Any:
        """The figure of this run alone."""
        routers = router_curves(self.log)
        held_to = None if self.target is None else (self.target, f"target {self.target:g}")
        layers = range(0 if routers is None else len(routers.active_LU))
        return draw_training(routers, layers, held_to, self.log, self.evaluations, dark=dark)


def curves_png(runs: Sequence[Path]) -> bytes:
    """The picture of one run, or of several in one. ValueError for one that cannot be read."""
    logs = [RunLog.read(run) for run in runs]
    return png_of(logs[0].draw() if len(runs) == 1 else draw_runs(dict(zip(_names(runs), logs, strict=True))))


def _names(runs: Sequence[Path]) -> list[str]:
    """The paths without the folders that all have in common."""
    parts = [run.absolute().parts for run in runs]
    while len({each[0] for each in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [each[1:] for each in parts]
    return ["/".join(each) for each in parts]


@styled
def draw_runs(runs: Mapping[str, RunLog], *, dark: bool = False) -> Any:
    """A line for each run, by its name, in the panels of `draw_training`; thin lines are those of its layers."""
    names = dict.fromkeys(name for run in runs.values() for name in measured_in(run.evaluations))
    found = {
        "Loss": "loss",
        **{name: name for name in names},
        ACTIVE: "active",
        "Threshold p": "p",
        **{label: name for name, label in LOGGED.items()},
    }
    lines = {label: with_it for label, name in found.items() if (with_it := _lines_with(runs, name))}
    low = [label for label in lines if label in LOGGED.values()]
    figure, panels = stacked([label for label in lines if label not in low], low)
    colours = {run: LINES[i % len(LINES)] for i, run in enumerate(runs)}
    for label, by_run in lines.items():
        axis, name = panels[label], found[label]
        for run, log in by_run.items():
            if name in names:
                axis.plot(*_points(log, name), color=colours[run], marker="o", markersize=3)
                axis.set_yscale("log")
            else:
                axis.plot(*smoothed(log, name)[:2], color=colours[run], label=run)
            if label == ACTIVE and (routers := router_curves(log)) is not None:
                axis.plot(routers.step_U, routers.active_LU.T, color=colours[run], alpha=0.3, linewidth=0.7)
        if label == "Loss" or label in low:
            axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    for run, log in _lines_with(runs, "heldout_loss").items():
        panels["Loss"].plot(*_points(log, "heldout_loss"), color=colours[run], linestyle=DASHED, linewidth=1.2)
    if _lines_with(runs, "heldout_loss"):
        panels["Loss"].plot([], [], color=INK[dark], linestyle=DASHED, linewidth=1.2, label="held out")
    if ACTIVE in lines:
        panels[ACTIVE].plot([], [], color=INK[dark], alpha=0.3, linewidth=0.7, label="each layer")
        handle = panels[ACTIVE].get_lines()[-1]
        labels_above(panels[ACTIVE], handles=[handle])
    labels_above(panels["Loss"], 1 if max(map(len, runs)) > 30 else 2)
    return figure


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    return [line["step"] for line in lines], [line[name] for line in lines]


def _lines_with(runs: Mapping[str, RunLog], name: str) -> dict[str, list[Mapping[str, Any]]]:
    """Of each run that has the number, the lines that do."""
    of_run = {run: [*log.log, *log.evaluations] for run, log in runs.items()}
    found = {run: [line for line in lines if line.get(name) is not None] for run, lines in of_run.items()}
    return {run: lines for run, lines in found.items() if lines}


class CurvesPicture:
    """`CURVES` of a run while it trains: drawn in a thread, now and then, so that no step waits for it."""

    def __init__(self, run: Path) -> None:
        self._run, self._thread = run, threading.Thread()
        self._drawn: bytes | None = None
        self._next, self._stale = time.monotonic() + FIRST, not (run / CURVES).exists()

    def update(self) -> bytes | None:
        """Call after every line of the log; returns a picture that was finished since the call before."""
        self._stale = True
        if self._thread.is_alive():
            return None
        drawn, self._drawn = self._drawn, None
        if time.monotonic() >= self._next:
            self._thread = threading.Thread(target=self._draw, daemon=True)
            self._thread.start()
        return drawn

    def finish(self) -> bytes | None:
        """Draw the whole of the log; returns the picture, or None if there was nothing new to draw, or it failed."""
        if self._thread.ident is not None:
            self._thread.join()
        self._drawn = None
        if self._stale and (self._run / "log.jsonl").exists():
            self._draw()
        return self._drawn

    def _draw(self) -> None:
        start = time.monotonic()
        try:
            picture = curves_png([self._run])
            write_atomically(self._run / CURVES, picture)
            self._drawn = picture
        except Exception as error:  # whatever it is: a picture is not worth a run
            tell(f"warning: no {CURVES}: {type(error).__name__}: {error}")
        end = time.monotonic()
        self._next = end + max(FIRST, (end - start) / SHARE)
