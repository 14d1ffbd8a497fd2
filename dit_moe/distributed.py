"""Which processes work together, on which device each does, how they call things together, and in which folder.

Also how a device without memory for the work is told from other errors.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from dit_moe.config import ConfigError, WorkFailed
from dit_moe.locks import exclusive

T = TypeVar("T")

JOINING = timedelta(minutes=5)  # until all processes that were started together are there
PATIENCE = timedelta(hours=1)  # of processes waiting for each other: one may still encode a shard, or verify them all
POLL = 0.2  # seconds between two looks at who has come

NO_MEMORY = re.compile(  # in the RuntimeErrors of torch's allocators, and of the libraries that it calls
    r"out of memory|not enough memory|can't allocate|cannot allocate|bad_alloc|ALLOC_FAILED|"
    "Storage size calculation overflowed",
    re.IGNORECASE,
)
LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun and accelerate set
_BY_A_LAUNCHER = "launch with torchrun or accelerate launch, which set all that is needed, or unset it"
GLOO = re.compile(r"\[\S*gloo/\S*\] ")  # its errors are plain RuntimeErrors that begin with a line of its source
AFTERWARDS = "look for its own message, then run the same command again, which goes on from what was saved"


class ProcessLost(WorkFailed):
    """Another of the processes that work together has ended, or never came."""


def cores() -> int:
    """CPU cores that this process may use; of the machine, where the system tells no more, as macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cpu() -> bool:
    """Whether to compute on the CPU: there is nothing else that can, or ACCELERATE_USE_CPU says so.

    accelerate has to be told: by itself it takes processes started on a machine without GPUs for so many single ones.
    """
    return flag("ACCELERATE_USE_CPU") or not torch.accelerator.is_available() or has_mps()


def has_mps() -> bool:
    """Whether the accelerator is a Mac's GPU, which has no float64: routers, schedules and metrics need it."""
    found = torch.accelerator.current_accelerator()
    return found is not None and found.type == "mps"


def flag(name: str) -> bool:
    """An environment variable that is true or false; false if it is not set. ConfigError for any other value."""
    try:
        return parse_flag_from_env(name)
    except ValueError:
        raise ConfigError(name, f"={os.environ[name]} must be true or false") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a device, be it a CPU, was too small for what was tried."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None)


@contextmanager
def enough_memory(failure: Callable[[str], Exception], remedy: str) -> Iterator[None]:
    """While entered, running out of memory raises `failure`, with a message that ends with the `remedy`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise failure(f"out of memory; {remedy}") from error


def join_processes() -> PartialState:
    """This process's place: alone, or one of those that `accelerate launch` or torchrun started.

    Raises ConfigError if the processes that were started cannot form a group, and ProcessLost if they are not all there
    within `JOINING`.
    """
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; cuDNN's convolutions would round to 10 bits
    _require_sound_launch()
    launched = _launched()
    meets = _has_launcher() and not dist.is_initialized()
    state = PartialState(cpu=use_cpu(), timeout=PATIENCE, **_meet(launched) if meets else {})
    if launched != state.num_processes:
        problem = f"={launched} processes were launched, but they cannot form a group on {state.device.type}"
        raise ConfigError("WORLD_SIZE", f"{problem}; launch one, or set ACCELERATE_USE_CPU=true")
    if state.device.type == "cpu":
        atexit.unregister(_leave_group)  # once, however often this is called
        atexit.register(_leave_group)
    return state


def _require_sound_launch() -> None:
    """ConfigError for what the environment says of processes and devices if it contradicts itself or this machine.

    torch and accelerate would wait for processes that nobody started, or end in an error of their own.
    """
    rank, local_rank = _number("RANK", -1), _number("LOCAL_RANK", -1)
    missing = [name for name in LAUNCHER if name not in os.environ]
    if _launched() > 1 and missing:
        raise ConfigError("WORLD_SIZE", f"={_launched()} is set, but not {', '.join(missing)}; {_BY_A_LAUNCHER}")
    if max(rank, local_rank) >= 0 and "WORLD_SIZE" in missing:
        name = "RANK" if rank >= 0 else "LOCAL_RANK"
        raise ConfigError(name, f"={os.environ[name]} is set, but not WORLD_SIZE; {_BY_A_LAUNCHER}")
    if rank >= _launched():
        raise ConfigError("RANK", f"={rank} must be below WORLD_SIZE={_launched()}; {_BY_A_LAUNCHER}")
    if flag("ACCELERATE_USE_SAGEMAKER") and os.environ.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE") != "NO":
        raise ConfigError("ACCELERATE_USE_SAGEMAKER", "=true is not supported; launch with torchrun")
    device = os.environ.get("ACCELERATE_TORCH_DEVICE")
    own = "cpu" if use_cpu() else str(torch.accelerator.current_accelerator())
    if device is not None and not re.fullmatch(rf"{own}(:\d+)?", device):
        problem = f"={device}, but this computes on {own}"
        raise ConfigError("ACCELERATE_TORCH_DEVICE", f"{problem}; unset it, or set ACCELERATE_USE_CPU=true for the CPU")
    if use_cpu():
        for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):  # accelerate would form a group
            if os.environ.get(name, "1") != "1" and "WORLD_SIZE" not in os.environ:
                problem = f"={os.environ[name]} processes were started by MPI, which does not say where they meet"
                raise ConfigError(name, f"{problem}; launch with torchrun or accelerate launch")
    elif local_rank >= (devices := torch.accelerator.device_count()):
        problem = f"={local_rank} has no device: this machine shows {devices}, counted from 0"
        raise ConfigError("LOCAL_RANK", f"{problem}; launch {devices} processes here, or check CUDA_VISIBLE_DEVICES")


def _meet(launched: int) -> dict[str, Any]:
    """Wait for all processes that were launched; returns what `init_process_group` makes their group with."""
    rank, deadline = _number("RANK", 0), time.monotonic() + JOINING.total_seconds()
    limit = f"within {JOINING.total_seconds():.0f} s"
    remedy = "look for the messages of the others, then start all of them again with the same command"
    address = (os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0))
    while rank > 0 and not _answers(address):  # torch would wait as well, deaf to signals
        if time.monotonic() > deadline:
            problem = f"process 0, or its launcher, did not come to {address[0]}:{address[1]} {limit}"
            raise ProcessLost(f"{_place()}: {problem}; {remedy}")
        time.sleep(POLL)
    # A meeting of one, to torch, which then waits for nobody: its own message would not say how many came.
    try:
        store, *_ = next(dist.rendezvous("env://", rank, 1, timeout=JOINING))
    except dist.DistNetworkError as error:
        if rank > 0 or "EADDRINUSE" not in str(error):
            raise
        problem = f"={address[1]} is in use by another program"
        raise ConfigError(
            "MASTER_PORT", f"{problem}; choose another port, for instance torchrun --master-port"
        ) from None
    came = _count(store, "dit_moe/came", launched, deadline)
    if came < launched:
        raise ProcessLost(f"{_place()}: only {came} of {launched} processes came {limit}; {remedy}")
    # Process 0 has the store, and must not end before the others have read there that all came.
    _count(store, "dit_moe/met", launched if rank == 0 else 1, deadline)
    store.set_timeout(PATIENCE)
    return {"store": store, "rank": rank, "world_size": launched}


def _count(store: dist.Store, name: str, wanted: int, deadline: float) -> int:
    """Add this process to the count of that name and wait for the `wanted` one; returns how many there were in time."""
    count = store.add(name, 1)
    try:
        while count < wanted and time.monotonic() < deadline:
            time.sleep(POLL)
            count = store.add(name, 0)
    except dist.DistError:
        pass  # process 0 has waited long enough, and the store has ended with it
    return count


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=10).close()
    except OSError:
        return False
    return True


def _leave_group() -> None:
    """End gloo's threads before the interpreter ends: one that lets go of a tensor after that aborts the process."""
    if dist.is_initialized():
        gc.collect()  # what still holds the group keeps its threads
        dist.destroy_process_group()


@contextmanager
def ending_together() -> Iterator[None]:
    """While entered, a process that loses another one says so: as ProcessLost, or when its launcher sends SIGTERM.

    The processes that were started together join on entering. A SIGTERM raises SystemExit, so that temporary files go.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()  # Python handles signals nowhere else
    before = signal.signal(signal.SIGTERM, _on_sigterm) if in_main_thread else None
    try:
        if _has_launcher() and not flag("ACCELERATE_USE_DEEPSPEED"):  # training refuses that by its name
            join_processes()
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or GLOO.match(str(error))):
            raise
        cause = re.split(r"\.\s|\n", GLOO.sub("", str(error)))[0]
        problem = f"{_place()}: another process ended, or did not answer ({cause})"
        raise ProcessLost(f"{problem}; {AFTERWARDS}") from error
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    if _launched() > 1:
        told = f"stopped: {_place()}: SIGTERM, which launchers send when another process has ended; {AFTERWARDS}\n"
        os.write(2, told.encode())  # not print: the signal may have come in the middle of one
    sys.exit(128 + signum)


def _launched() -> int:
    """How many processes were started together."""
    return _number("WORLD_SIZE", 1)


def _number(name: str, default: int) -> int:
    """A whole number in the environment. ConfigError for anything else."""
    value = os.environ.get(name, str(default))
    if not re.fullmatch(r"-?\d+", value):
        raise ConfigError(name, f"={value} must be a whole number; {_BY_A_LAUNCHER}")
    return int(value)


def _has_launcher() -> bool:
    """Whether torchrun or accelerate started this process beside others: a cluster may set WORLD_SIZE in any shell."""
    return _launched() > 1 and os.environ.keys() >= set(LAUNCHER)


def _place() -> str:
    return f"process {os.environ.get('RANK', '0')} of {_launched()}"


def first_to_say(text: str) -> bool:
    """Whether no other of the processes that work together has asked this of the same text; True for one alone."""
    if not dist.is_initialized():
        return True
    key, patience = f"dit_moe/said/{hashlib.sha256(text.encode(errors='replace')).hexdigest()}", time.monotonic() + 2
    try:
        store = dist.distributed_c10d._get_default_store()
        first = store.add(key, 1) == 1
        while dist.get_rank() == 0 and store.add(key, 0) < dist.get_world_size() and time.monotonic() < patience:
            time.sleep(POLL / 10)  # the store ends with process 0
    except RuntimeError:  # it has ended
        return True
    return first


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


def on_main(call: Callable[[], T]) -> T | None:
    """Call it on the main process while the others wait: what it returns there, None on them. It raises on all."""
    made: list[T] = []

    def alone() -> None:
        if join_processes().is_main_process:
            made.append(call())

    on_all(alone)
    return made[0] if made else None


def from_main(call: Callable[[], T]) -> T:
    """Call it on the main process; all get what it returns, and what it raises is raised on all."""
    return on_all(lambda: [call()] if join_processes().is_main_process else [])[0][0]


@contextmanager
def locked(folder: Path, *files: str) -> Iterator[None]:
    """While entered, no other command can enter the output `folder`, or these `files` in it.

    The folder is made if need be. The processes enter it together, and may again within. Raises ValueError, on every
    process, if another command is in there or the folder cannot be written.
    """
    with ExitStack() as held:

        def enter() -> None:
            for file in sorted(set(files)) or [""]:
                held.enter_context(exclusive(folder, file))

        on_main(enter)
        yield
