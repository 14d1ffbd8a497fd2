"""What a run logs: log.jsonl and evaluations.jsonl, a progress bar, and trackers; and what its log says of it later.

Each file has a JSON object per line, always one per logged step, however often a run was resumed.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, Self, TypedDict

from dit_moe.config import ConfigError, Tree, Within, convert
from dit_moe.distributed import join_processes
from dit_moe.files import sync, write_atomically
from dit_moe.formatting import tell
from dit_moe.json_files import Count, NonNegative, parse
from dit_moe.moe import MoEConfig
from dit_moe.progress import TrainingBar
from dit_moe.training.config import TrainConfig
from dit_moe.training.step import ACTIVE_PEAK, DROPPED
from dit_moe.training.trackers import Trackers, flatten, tracked

if TYPE_CHECKING:
    from dit_moe.training.curves_of_runs import CurvesPicture


@dataclass(frozen=True)
class Unit:
    """What the log counts: a name in the plural, and how many of it make a row of data."""

    name: str
    per_row: int = 1


class Logger:
    """Collects the numbers of every step, and writes a line every `log_every` steps and at the end.

    Losses, the gradient norm and `DROPPED` in a line are means over the steps since the line before, and `ACTIVE_PEAK`
    is their largest, also where the run was resumed in between: `unlogged` of the earlier logger is in the checkpoint.
    The other numbers of the routers are those of the step itself, and rates are of the steps since the start. `seconds`
    are the wall time of the run so far, over all its starts, with checkpoints and samples. Only the main process
    writes.
    """

    def __init__(
        self,
        trackers: Trackers,
        config: TrainConfig,
        run: Path,
        step: int,
        unit: Unit,
        unlogged: Mapping[str, Any] | None = None,
        changes: Sequence[Mapping[str, Any]] = (),
        curves: CurvesPicture | None = None,
    ) -> None:
        self._trackers, self._config, self._unit = trackers, config, unit
        main = join_processes().is_main_process
        self._curves = curves if main else None
        self._last = step  # that has a line
        self._log = JsonLines(run / "log.jsonl", step) if main else None
        self._evaluations = JsonLines(run / "evaluations.jsonl", step) if main else None
        self._progress = TrainingBar(config.steps, step, unit.name, shown=main)
        earlier = unlogged or {"steps": 0, "gathered": {}}
        self._steps: int = earlier["steps"]  # since the line before
        self._gathered: dict[str, float] = dict(earlier["gathered"])  # sums over them, and the largest of `ACTIVE_PEAK`
        self._warned = False  # of what was dropped
        self._timed_steps, self._since = 0, time.perf_counter()
        before = None if self._log is None else self._log.last()
        self._start = self._since - ((before or {}).get("seconds") or 0.0)
        last = step - self._steps  # that has a line
        if main and unlogged and last > 0 and self._log is not None and not self._log.ends_with(last):
            lost = f"lacks the line of step {last}, with which it ended when that was saved"
            tell(f"warning: {run / 'log.jsonl'} {lost}; figures and the time of the run are of what is left of it")
        # Of the settings, since the line before, which is the last of the log.
        self._changes = [change for change in changes if change["step"] >= step - self._steps]

    @property
    def unlogged(self) -> dict[str, Any]:
        """JSON-ready: steps since the last line, for the next one to average."""
        return {"steps": self._steps, "gathered": self._gathered}

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)
        if self._curves is not None and (picture := self._curves.finish()) is not None:
            self._trackers.log_picture("curves", picture, self._last)
        self._trackers.finish()  # not accelerate's end_training(), which would end the processes' group, too

    def due(self, step: int) -> bool:
        """Whether step number `step` gets a line."""
        return step % self._config.log_every == 0 or step == self._config.steps

    def step(self, step: int, values: dict[str, float], lr: float, routers: dict[str, Any]) -> None:
        """Take in step number `step` (counted from 1): its numbers, and the routers' if it is due a line."""
        self._steps, self._timed_steps = self._steps + 1, self._timed_steps + 1
        for name, value in values.items():
            before = self._gathered.get(name, 0.0)
            self._gathered[name] = max(before, value) if name == ACTIVE_PEAK else before + value
        self._progress.step(step)
        if self.due(step):
            line = self._line(step, lr, routers)
            self._steps, self._gathered, self._changes = 0, {}, []
            self._timed_steps, self._since = 0, time.perf_counter()
            self._progress.line(line)
            if line.get(DROPPED, 0) > 0 and not self._warned:
                self._warned = True
                what = f"{line[DROPPED]:.3g} experts per token have been dropped since the line before"
                self.message(f"warning: step {step}: {what}, for want of room; raise model.moe.capacity_factor")
            self._trackers.log(tracked(line), step)
            if self._log is not None:
                self._log.write(line)
            if self._curves is not None and (picture := self._curves.update()) is not None:
                self._trackers.log_picture("curves", picture, step)
            self._last = step

    def evaluation(self, step: int, numbers: dict[str, Any]) -> None:
        """Take in what the hooks return after step number `step`; trackers get numbers under "eval/", and pictures."""
        for name in [name for name, value in numbers.items() if isinstance(value, Path)]:
            self._trackers.log_picture(name, numbers.pop(name).read_bytes(), step)
        if self._evaluations is not None and numbers:
            self._evaluations.write(dict(step=step, **numbers))
            self._trackers.log(flatten({"eval": numbers}), step)
            shown = [f"{name} {value:.4g}" for name, value in flatten(numbers).items()]
            self.message(f"step {step}/{self._config.steps}  {'  '.join(shown)}")

    def evaluated(self, step: int) -> bool:
        """Whether step number `step`, the last one, has its line of evaluations; other processes do not know."""
        return self._evaluations is not None and self._evaluations.ends_with(step)

    def _line(self, step: int, lr: float, routers: dict[str, Any]) -> dict[str, Any]:
        seconds = time.perf_counter() - self._since
        means = {name: value if name == ACTIVE_PEAK else value / self._steps for name, value in self._gathered.items()}
        name, a_step = self._unit.name, self._config.batch_size * self._unit.per_row
        done = {"step": step, name: step * a_step, "seconds": time.perf_counter() - self._start}
        changes = {"changes": self._changes} if self._changes else {}
        return done | means | {"lr": lr, f"{name}_per_s": self._timed_steps * a_step / seconds} | routers | changes

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Work in here does not count in the rate: checkpoints, grids of samples."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    @contextmanager
    def recurring(self, work: str, every: int) -> Iterator[None]:
        """Work in here comes again every so many steps: the time left counts it, once it is known."""
        start = time.perf_counter()
        yield
        self._progress.beside(work, every, time.perf_counter() - start)

    def sync(self) -> None:
        """Put the logs on the disk."""
        for log in (self._log, self._evaluations):
            if log is not None:
                log.sync()

    def message(self, text: str) -> None:
        """Show a line of its own on stderr."""
        self._progress.message(text)


class JsonLines:
    """Appends lines to a file whose lines all belong to steps up to `step`, the one that the run (re)starts from.

    The file is made with its first line.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        if path.exists():
            self._cut(step)

    def write(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def last(self) -> Tree | None:
        """The last line, if there is one."""
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        return _parsed(lines[-1]) if lines else None

    def ends_with(self, step: int) -> bool:
        """Whether the last line is of `step`."""
        return (self.last() or {}).get("step") == step

    def sync(self) -> None:
        """Put every line on the disk: a checkpoint must not be newer than its log."""
        if self._path.exists():
            sync(self._path)

    def _cut(self, step: int) -> None:
        """Drop, in one atomic replacement, the lines past `step`, and the last one if it was not written to its end.

        Lines that cannot be read are moved to a file beside it, and stderr says so.
        """
        path = self._path
        lines = path.read_bytes().splitlines(keepends=True)
        kept, damaged = [], []
        for line in lines:
            if line.endswith(b"\n"):
                try:
                    if _parsed(line)["step"] <= step:
                        kept.append(line)
                except ValueError:
                    damaged.append(line)
        if damaged:
            aside = path.with_name(f"{path.name}.damaged")
            with aside.open("ab") as file:
                file.writelines(damaged)
                os.fsync(file.fileno())
            count = "a line" if len(damaged) == 1 else f"{len(damaged)} lines"
            tell(f"warning: {path} has {count} that cannot be read, now in {aside.name}")
        if kept != lines:
            write_atomically(path, b"".join(kept))


# ------------------------------------------------------------------------------------------------- reading a log later


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl or evaluations.jsonl; none where there is no such file.

    ValueError for one that cannot be read.
    """
    found: list[Tree] = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], start=1):
        try:
            found.append(_parsed(line))
            if missing := sorted(_IN_ALL & found[0].keys() - found[-1].keys()):
                raise ValueError(f"has no {missing[0]}, which the first has")
            if (layers := _layers(found[-1])) and (before := _layers(found[0])) and layers != before:
                raise ValueError(f"has numbers of {layers} layers, where the first has those of {before}")
        except ValueError as error:
            remedy = "take it out, or let the run go on, which puts aside what cannot be read"
            raise ValueError(f"{path}: line {number} {error}; {remedy}") from None
    return found


_Rate = Annotated[float, Within(1e-9, 1e18)]
_IN_ALL = {"loss", "images", "tokens", "images_per_s", "tokens_per_s", "active", "layers"}  # lines, or in none


class _Line(TypedDict):
    """Of a log: what is drawn or averaged of it. Its other numbers may be NaN, where they are means of nothing."""

    step: Count
    loss: NotRequired[float]
    images: NotRequired[Count]
    tokens: NotRequired[Count]
    seconds: NotRequired[NonNegative]
    images_per_s: NotRequired[_Rate]
    tokens_per_s: NotRequired[_Rate]
    heldout_loss: NotRequired[float | None]
    active: NotRequired[NonNegative | None]
    p: NotRequired[Annotated[float, Within(0, 1)] | None]
    layers: NotRequired[dict[str, Any] | None]  # a number for each layer, by name
    changes: NotRequired[list[dict[str, Any]]]  # of the settings, on resuming


def _parsed(line: bytes) -> Tree:
    """A line of a log. ValueError says what is wrong with it."""
    found = parse(line, any_number=True)
    if not isinstance(found, dict):
        raise ValueError("holds no JSON object")
    try:
        found = dict(convert(_Line, found))
    except ConfigError as error:
        raise ValueError(f"has {error}") from None
    layers = list((found.get("layers") or {}).values())
    numbers = [value for name, value in found.items() if name not in ("layers", "changes")]
    numbers += [number for values in layers if isinstance(values, list) for number in values]
    if not {type(number) for number in numbers} <= {int, float, NoneType} or len({*map(type, layers)} | {list}) > 1:
        raise ValueError("has other things than numbers")
    if len({len(values) for values in layers}) > 1:
        raise ValueError("has numbers of more layers by one name than by another")
    return found


def _layers(line: Tree) -> int:
    """How many layers a line has numbers of."""
    return len(next(iter((line.get("layers") or {}).values()), ()))


def active_experts(log: Sequence[Mapping[str, Any]], moe: MoEConfig | None) -> dict[str, float] | None:
    """Target, and mean and std over the logged steps of the last quarter; None for a dense model, or without a log.

    With a capacity factor also what was dropped on average over all steps, as `DROPPED`.
    """
    if moe is None or not log:
        return None
    last = [line["active"] for line in log if line["step"] > 0.75 * log[-1]["step"]]
    found = {"target": moe.target, "mean": statistics.fmean(last), "std": statistics.pstdev(last)}
    if DROPPED not in log[-1]:
        return found
    steps = [line["step"] for line in log]
    total = sum(line[DROPPED] * (step - before) for line, step, before in zip(log, steps, [0, *steps], strict=False))
    return found | {DROPPED: total / steps[-1]}


def train_seconds(log: Sequence[Mapping[str, Any]], unit: str) -> float:
    """Time spent in training steps over all starts of the run, without checkpoints and samples.

    `unit` is what the log counts.
    """
    counts = [0, *[line[unit] for line in log]]
    return sum(
        (after - before) / line[f"{unit}_per_s"] for before, after, line in zip(counts, counts[1:], log, strict=False)
    )
