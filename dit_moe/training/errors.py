"""How a run that has begun can end early."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """The run failed in the middle; the checkpoints written so far are good."""


class Interrupted(Exception):
    """The run was asked to stop by the signal `signum`, and saved itself first."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
