"""Where the time of training goes: `dit-moe train CONFIG --profile N`.

The run is as without it. After a few steps to warm up, N steps are timed by their parts; the one after is traced.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from dit_moe.config import ConfigError
from dit_moe.files import write_atomically
from dit_moe.formatting import rounded
from dit_moe.moe import routers_of
from dit_moe.training.devices import peak_memory

WARM_UP = 3  # steps
FILE, TRACE = "profile.json", "profile_trace.json.gz"  # in the run folder
PARTS = {  # of a step, and what the report says that they are
    "data": "the next batch: read, decoded, sent to the device",
    "forward": "the network and the loss, without the routers",
    "routers": "routers: forward pass, thresholds, statistics",
    "backward": "gradients",
    "optimizer": "gradient norm, clipping, AdamW",
    "average": "the moving average of the weights",
    "logging": "log, trackers, progress",
    "rest": "what is left",
}
Phase = Callable[[str], AbstractContextManager[Any]]


def untimed(part: str) -> AbstractContextManager[None]:
    """The `Phase` of a training that is not profiled."""
    return nullcontext()


class StepProfile:
    """Times the parts of `steps` steps, traces one more, and writes both into the run folder.

    Args:
        flops: of a step, in all processes together.
        peak: FLOP/s that all devices together can do; None: not known.
        count: how many of `unit`, images or tokens, a step takes.
    """

    def __init__(
        self, steps: int, *, flops: float, peak: float | None = None, count: int = 0, unit: str = "images"
    ) -> None:
        if steps < 1:
            raise ConfigError("--profile", f"={steps} must be at least 1")
        self.steps, self.flops, self.peak, self.count, self.unit = steps, flops, peak, count, unit
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._done = 0  # steps of this training
        self._parts: list[str] = []  # those that are entered, the outer ones first
        self._since = 0.0
        self._device: torch.device | None = None
        self._handles: list[Any] = []
        self._profiler: torch.profiler.profile | None = None

    def require_fit(self, left: int) -> None:
        """ConfigError if the training has only so many steps `left`."""
        needed = WARM_UP + self.steps + 1
        if left < needed:
            problem = f"={self.steps} takes {needed} steps with those before and the traced one"
            raise ConfigError("--profile", f"{problem}, and {left} are left to train; raise train.steps or lower it")

    def start(self, model: nn.Module, device: torch.device) -> None:
        """Called before the first step."""
        self._device = device
        for router in routers_of(model):
            self._handles.append(router.register_forward_pre_hook(lambda *_: self._in_router(True)))
            self._handles.append(router.register_forward_hook(lambda *_: self._in_router(False)))
        self._wait()
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, part: str) -> Iterator[None]:
        """Within it the time counts for `part`, but for parts inside it."""
        self._enter(part)
        with record_function(part):
            yield
        self._leave()

    def end_step(self, run: Path, write: bool) -> str | None:
        """Called after each step. After the last it returns a report, and writes into the folder `run` if told to."""
        self._count("rest")
        self._done += 1
        if self._done == WARM_UP:
            self.seconds = dict.fromkeys(PARTS, 0.0)
        elif self._done == WARM_UP + self.steps:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports itself, and that there is no GPU
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU, *cuda])
            self._profiler.start()
        elif self._done == WARM_UP + self.steps + 1:
            assert self._profiler is not None
            self._wait()
            self._profiler.stop()
            for handle in self._handles:
                handle.remove()
            if write:
                self._write(run)
            return self.report()
        self._since = time.perf_counter()
        return None

    @property
    def is_done(self) -> bool:
        return self._done > WARM_UP + self.steps

    def numbers(self) -> dict[str, Any]:
        """What profile.json holds; times are of a step, in seconds."""
        total = sum(self.seconds.values()) / self.steps
        return {
            "steps": self.steps,
            "seconds": total,
            f"{self.unit}_per_s": self.count / total,
            "parts": {part: seconds / self.steps for part, seconds in self.seconds.items()},
            "flops_per_s": self.flops / total,
            "mfu": None if self.peak is None else self.flops / total / self.peak,
            "memory": peak_memory(),
        }

    def report(self) -> str:
        """Lines for people."""
        found = self.numbers()
        mfu = f" ({found['mfu']:.1%} of the peak)" if found["mfu"] is not None else ""
        lines = [
            f"profile of {self.steps} steps: {found['seconds'] * 1e3:.1f} ms a step, "
            f"{rounded(found[f'{self.unit}_per_s'], 3)} {self.unit}/s, "
            f"{_rate(found['flops_per_s'])}{mfu}, {found['memory'] / 2**30:.2f} GiB at most"
        ]
        for part, seconds in found["parts"].items():
            lines.append(f"  {seconds / found['seconds']:6.1%} {seconds * 1e3:9.2f} ms  {part:10} {PARTS[part]}")
        return "\n".join(lines)

    def _write(self, run: Path) -> None:
        assert self._profiler is not None
        unfinished = run / f"unfinished_{TRACE}"
        self._profiler.export_chrome_trace(str(unfinished))
        unfinished.replace(run / TRACE)
        write_atomically(run / FILE, json.dumps(self.numbers(), indent=1) + "\n")

    def _in_router(self, entered: bool) -> None:
        """What is compiled with its block has no time of its own, and counts for what it is part of."""
        if torch.compiler.is_compiling():
            return
        if entered:
            self._enter("routers")
        else:
            self._leave()

    def _enter(self, part: str) -> None:
        self._count(self._parts[-1] if self._parts else "rest")
        self._parts.append(part)

    def _leave(self) -> None:
        self._count(self._parts.pop())

    def _count(self, part: str) -> None:
        """The time since the last call for `part`, once the device is done with it."""
        if self._profiler is not None or self.is_done:
            return  # the traced step is not timed, nor does it wait
        self._wait()
        now = time.perf_counter()
        self.seconds[part] += now - self._since
        self._since = now

    def _wait(self) -> None:
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _rate(flops_per_s: float) -> str:
    large = flops_per_s >= 1e12
    return f"{flops_per_s / (1e12 if large else 1e9):.3g} {'T' if large else 'G'}FLOP/s"
