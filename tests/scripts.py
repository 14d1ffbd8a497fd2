"""Scripts that tests start as programs of their own: on one process or several, with deaths of kill -9 on demand."""

from __future__ import annotations

import fcntl
import gc
import importlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FORKED = [str(Path(__file__).with_name("forked.py"))]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def start(
    script: str | Path, *words: object, processes: int = 1, torchrun: bool = False
) -> subprocess.CompletedProcess[str]:
    """How a script ended; it can import what the test can. Forks start in a fraction of the time of `torchrun`."""
    launcher = [*TORCHRUN, str(processes), "--"] if torchrun else [*FORKED, str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), *map(str, (script, *words))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"PYTHONFAULTHANDLER": "1"}  # where each thread was when a process was aborted
    # A process left alone by the others would wait for half an hour; the longest took 77 s on two busy cores.
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def said(script: str | Path, *words: object, processes: int = 1, torchrun: bool = False) -> list[str]:
    """The words that a script printed, which must end well."""
    done = start(script, *words, processes=processes, torchrun=torchrun)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@contextmanager
def in_use(folder: Path, file: str = "") -> Iterator[None]:
    """While entered, an output is as if another process wrote it."""
    with (folder / (f".{file}.lock" if file else ".lock")).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        Path(lock.name).unlink()


def prepare_forks() -> None:
    """Import what the package imports late, once rather than in every fork, and let no fork look for garbage in it."""
    for name in ("sklearn.datasets", "timm"):
        importlib.import_module(name)
    gc.freeze()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_five_times(work: Callable[[], object], made: Callable[[], int]) -> list[int]:
    """Five times, begin `work` and die soon after something was `made`: how much there is at each death.

    Deaths are those of forks, which need no start of their own. What computes with torch needs a script of its own: a
    fork has none of the threads that torch began before.
    """
    chance, found = random.Random(0), []
    for _ in range(5):
        before = made()
        child = os.fork()
        if child == 0:
            work()
            os._exit(0)
        while made() == before:  # some progress, then death at any moment of what comes next
            assert not os.waitpid(child, os.WNOHANG)[0], "the process to be killed ended by itself"
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found.append(made())
    return found
