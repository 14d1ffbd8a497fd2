"""Cases of several processes: FOLDER has what each of them said, <case>_<rank>.txt, and its exit code, .code.

They are forks, which need no start of their own, and all cases run side by side. FOLDER/latents has encoded digits,
and RUN is a small run on digits.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from dit_moe import distributed
from dit_moe.cli import main
from dit_moe.tasks import images  # noqa: F401 (before the forks, as the next)
from dit_moe.text import perplexity  # noqa: F401
from dit_moe.training.data_loader import Prefetcher
from tests.cli.conftest import CONFIG, SMALL, cli
from tests.distributed.evaluating import evaluate
from tests.distributed.streaming import streaming
from tests.distributed.test_latents import words
from tests.scripts import die, prepare_forks

FOLDER, RUN = map(Path, sys.argv[1:])


def started(case: str, rank: int, processes: int, port: int, work: Callable[[], int | None]) -> int:
    """The id of a new process, one of some, that does some work."""
    child = os.fork()
    if child:
        return child
    for stream in (1, 2):
        os.dup2(os.open(FOLDER / f"{case}_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
    os.environ |= {"WORLD_SIZE": f"{processes}", "LOCAL_WORLD_SIZE": f"{processes}"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    try:
        code = work()
    except SystemExit as stop:
        code = stop.code
    atexit._run_exitfuncs()
    os._exit(code or 0)  # the rest of an interpreter's end takes two seconds, in which nothing happens here


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def together() -> None:
    """Join twice, and say what there is then and at the very end."""

    def tell() -> None:
        print(torch.distributed.is_initialized(), flush=True)

    atexit.register(tell)  # first in, so last out: after all that join_processes registers
    distributed.join_processes()
    distributed.join_processes()
    tell()


def missing() -> int:
    """Wait for another process, for a second."""
    distributed.JOINING = timedelta(seconds=1)
    return main(["table"])


def told_to_stop() -> int:
    """Wait for another process, and be sent SIGTERM."""
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    return main(["table"])


def training() -> int:
    """Train; the second process dies in the third step, when the second is saved."""
    advance, steps = Prefetcher.advance, []

    def mortal(self) -> None:
        steps.append(1)
        if len(steps) == 4 and os.environ["RANK"] == "1":
            die()
        advance(self)

    Prefetcher.advance = mortal
    return main(["train", CONFIG, "--run", str(FOLDER / "run"), *SMALL])


def on_latents() -> int:
    """Train on the latents, in each way of sharing the model."""
    place = FOLDER / "latents"
    return max(cli("train", *words(place, place / way, f"train.parallel={way}")) for way in ("ddp", "fsdp2"))


CASES = (  # the ranks that there are, and how many each waits for
    ("together", (0, 1), 2, together),
    ("alone", (0,), 2, missing),
    ("without_first", (1,), 2, missing),
    ("told_to_stop", (0,), 2, told_to_stop),
    ("training", (0, 1), 2, training),
    ("on_latents", (0, 1), 2, on_latents),
    ("streaming", (0, 1, 2), 3, partial(streaming, FOLDER)),
    ("eval", (0, 1, 2), 3, partial(evaluate, RUN, FOLDER / "eval")),
    ("eval_killed", (0,), 1, partial(evaluate, RUN, FOLDER / "eval_killed", deaths=(2, 1))),
)

if __name__ == "__main__":
    prepare_forks()
    running = {}
    for case, ranks, processes, work in CASES:
        port = free_port()
        running |= {f"{case}_{rank}": started(case, rank, processes, port, work) for rank in ranks}
    for name, child in running.items():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (FOLDER / f"{name}.code").write_text(str(code))
