"""What a run tells while it goes on: log.jsonl, evaluations.jsonl, the progress bar, and trackers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from accelerate import Accelerator

from dit_moe.config import Tree
from dit_moe.training.config import TrainConfig
from dit_moe.training.log import RunLog, flatten
from dit_moe.training.progress import Progress, Unit

PEAK = "active_peak"  # of the log: the largest mean of active experts that a step had


class Report:
    """Collects the numbers of every step, and writes a line every `log_every` steps and at the end.

    Losses and the gradient norm in a line are means over the steps since the line before, and `PEAK` is their largest,
    also where the run was resumed in between: `since_line` of the earlier report is in the checkpoint. What else the
    routers did is that of the step itself, and rates are of the steps since the start. Only the main process writes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrainConfig,
        run: Path,
        step: int,
        unit: Unit,
        since_line: Mapping[str, Any] | None = None,
    ) -> None:
        self._accelerator, self._config, self._unit = accelerator, config, unit
        main = accelerator.is_main_process
        self._log = RunLog(run / "log.jsonl", step) if main else None
        self._evaluations = RunLog(run / "evaluations.jsonl", step) if main else None
        self._progress = Progress(config.steps, step, unit.name, shown=main)
        earlier = since_line or {"steps": 0, "gathered": {}}
        self._steps: int = earlier["steps"]  # since the line before
        self._gathered: dict[str, float] = dict(earlier["gathered"])  # sums over them, and the largest of `PEAK`
        self._timed_steps, self._since = 0, time.perf_counter()

    @property
    def since_line(self) -> dict[str, Any]:
        """JSON-ready: what the next line is to average beside the steps to come."""
        return {"steps": self._steps, "gathered": self._gathered}

    def start_trackers(self, run: Path, config: Tree) -> None:
        name = {"name": run.name}
        self._accelerator.init_trackers("dit_moe", flatten(config), {"wandb": name, "trackio": name})

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        for log in self._logs():
            log.close()
        for tracker in self._accelerator.trackers:  # not end_training(), which would end the processes' group, too
            tracker.finish()

    def due(self, step: int) -> bool:
        """Whether step number `step` gets a line."""
        return step % self._config.log_every == 0 or step == self._config.steps

    def step(self, step: int, values: dict[str, float], lr: float, telemetry: dict[str, Any]) -> None:
        """Take in step number `step` (counted from 1): its numbers, and the routers' if it is due a line."""
        self._steps, self._timed_steps = self._steps + 1, self._timed_steps + 1
        for name, value in values.items():
            before = self._gathered.get(name, 0.0)
            self._gathered[name] = max(before, value) if name == PEAK else before + value
        self._progress.step(step)
        if self.due(step):
            line = self._line(step, lr, telemetry)
            self._steps, self._gathered = 0, {}
            self._timed_steps, self._since = 0, time.perf_counter()
            self._progress.line(line)
            self._accelerator.log(flatten(line), step=step)
            if self._log is not None:
                self._log.write(line)

    def evaluation(self, step: int, numbers: dict[str, Any]) -> None:
        """Take in what the hooks measured after step number `step`; trackers get it under "eval/"."""
        if self._evaluations is not None and numbers:
            self._evaluations.write(dict(step=step, **numbers))
            self._accelerator.log(flatten({"eval": numbers}), step=step)
            shown = [f"{name} {value:.4g}" for name, value in flatten(numbers).items()]
            self.say(f"step {step}/{self._config.steps}  {'  '.join(shown)}")

    def evaluated(self, step: int) -> bool:
        """Whether step number `step`, the last one, has its line of evaluations; other processes do not know."""
        return self._evaluations is not None and self._evaluations.ends_with(step)

    def _line(self, step: int, lr: float, telemetry: dict[str, Any]) -> dict[str, Any]:
        seconds = time.perf_counter() - self._since
        means = {name: value if name == PEAK else value / self._steps for name, value in self._gathered.items()}
        name, a_step = self._unit.name, self._config.batch_size * self._unit.per_row
        done = {"step": step, name: step * a_step}
        return done | means | {"lr": lr, f"{name}_per_s": self._timed_steps * a_step / seconds} | telemetry

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Work in here does not count in the rate: checkpoints, grids of samples."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def sync(self) -> None:
        """Put the logs on the disk."""
        for log in self._logs():
            log.sync()

    def _logs(self) -> list[RunLog]:
        return [log for log in (self._log, self._evaluations) if log is not None]

    def say(self, message: str) -> None:
        self._progress.say(message)
