"""Which processes work together, on which device each does, how they call things together, and in which folder."""

from __future__ import annotations

import atexit
import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from dit_moe.config import ConfigError
from dit_moe.files import require_writable

T = TypeVar("T")

PATIENCE = timedelta(hours=1)  # of processes waiting for each other: one may still encode a shard, or verify them all


def use_cpu() -> bool:
    """Whether to compute on the CPU: there is nothing else, or ACCELERATE_USE_CPU says so.

    accelerate has to be told: by itself it takes processes started on a machine without GPUs for so many single ones.
    """
    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def join_processes() -> PartialState:
    """This process's place: alone, or one of those that `accelerate launch` or torchrun started.

    Raises ConfigError if the processes that were started cannot form a group.
    """
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; cuDNN's convolutions would round to 10 bits
    state = PartialState(cpu=use_cpu(), timeout=PATIENCE)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        problem = f"={launched} processes were launched, but they cannot form a group on {state.device.type}"
        raise ConfigError("WORLD_SIZE", f"{problem}; launch one, or set ACCELERATE_USE_CPU=true")
    if state.device.type == "cpu":
        atexit.unregister(_leave_group)  # once, however often this is called
        atexit.register(_leave_group)
    return state


def _leave_group() -> None:
    """End gloo's threads before the interpreter ends: one that lets go of a tensor after that aborts the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def on_all(call: Callable[[], T]) -> list[T]:
    """Call it on every process; each gets what all of them returned, in the order of ranks.

    What it raises on one is raised on all: none is left to wait for that one.
    """
    join_processes()
    made: list[T] = []
    problem: Exception | None = None
    try:
        made.append(call())
    except Exception as error:
        problem = error
    # A ConfigError cannot be sent, being built from more than its message; to the others the message is enough.
    told = ValueError(str(problem)) if isinstance(problem, ValueError) else problem
    answers: list[tuple[list[T], Exception | None]] = gather_object([(made, told)])
    for each in (problem, *(told for _, told in answers)):
        if each is not None:
            raise each
    return [one for made, _ in answers for one in made]


def on_main(call: Callable[[], object]) -> None:
    """Call it on the main process while the others wait. What it raises is raised on all."""

    def alone() -> None:
        if join_processes().is_main_process:
            call()

    on_all(alone)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While entered, no other command can enter `folder`, which is made if need be; the processes enter it together.

    Raises ValueError, on every process, if another command is in there or the folder cannot be written.
    """
    with ExitStack() as held:

        def lock() -> None:
            require_writable(folder)
            file = held.enter_context((folder / ".lock").open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
            except BlockingIOError:
                remedy = "wait for it, or choose another folder"
                raise ValueError(f"{folder} is in use by another process; {remedy}") from None
            except OSError as error:  # some clusters' file systems have no locks
                warning = f"warning: {folder} cannot be locked ({error.strerror}); start nothing else in it"
                print(warning, file=sys.stderr)

        on_main(lock)
        yield
