"""How a run that has begun can end early: by an error, or by a signal that the loop reads between two steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any, Self

from dit_moe.config import WorkFailed

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last: schedulers announce the end of a job by it


class TrainingError(WorkFailed):
    """The run failed in the middle; the checkpoints written so far are good."""


class Interrupted(Exception):
    """The run was asked to stop by the signal `signum`, and saved itself first."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class InterruptWatch:
    """While entered, the first of `SIGNALS` only sets `signum`; a second Ctrl-C kills.

    Launchers pass a signal on that the terminal or the scheduler has delivered to every process already, so the same
    signal may come twice at once: what follows within a second is not a second wish, and only Ctrl-C ever is.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._first = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._before = {each: signal.signal(each, self._on_signal) for each in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum, self._first = signum, time.monotonic()
            # not print: the signal may have come in the middle of one
            with suppress(OSError):  # Ctrl-C ends the reader of a pipe, too
                os.write(
                    2, b"\nstopping: this step is finished and saved, with its samples; a second Ctrl-C stops at once\n"
                )
        elif signum == signal.SIGINT and time.monotonic() - self._first > 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
