"""Independent pieces of work shared out over threads that compute with one thread each."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from threading import Barrier, Lock, main_thread

import torch

from dit_moe.formatting import tell


def over_threads(costs: list[int], work: Callable[[list[int]], None]) -> None:
    """Call `work` in each thread with the numbers of its items. Who gets which depends on the costs alone.

    Returns, or raises what one of them raised, when all have ended. Any thread may call it.
    """
    threads = min(torch.get_num_threads(), len(costs))
    # What watches operations, as a counter of FLOPs does, sees those of its own thread alone.
    if threads <= 1 or torch._C._len_torch_dispatch_stack():
        work(list(range(len(costs))))
    else:
        # Each thread has its own gradient mode, and what is made in inference mode is written in inference mode alone.
        without = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad
        run = without()(work)
        futures: list[Future[None]] = []
        left: list[int] = []
        for share in shared_out(costs, threads):
            try:
                futures.append(_workers().submit(run, share))
            except RuntimeError as error:  # when the main thread has ended, or at a limit of the system
                left += share
                if main_thread().is_alive():
                    _tell_once(threads, str(error))
        wait(futures)  # for all, before the first error is raised: none is to work on when the caller goes on
        while futures:
            futures.pop().result()  # no name is left for it: an error would keep what it is part of in memory
        if left:
            run(left)


@cache
def _tell_once(threads: int, why: str) -> None:
    what = f"{threads} threads were to compute the experts, and not all can be started ({why})"
    remedy = "raise the limit of processes (ulimit -u, or that of the container), or set OMP_NUM_THREADS=1"
    tell(f"warning: {what}: the rest is computed in the calling thread, which is slow; {remedy}")


def shared_out(costs: list[int], threads: int) -> list[list[int]]:
    """Numbers of items, so that each thread's costs are about equal: the dearest first, to who has least."""
    loads = [0] * threads
    shares: list[list[int]] = [[] for _ in range(threads)]
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        thread = loads.index(min(loads))
        loads[thread] += costs[item]
        shares[thread].append(item)
    return shares


_pools: dict[int, ThreadPoolExecutor] = {}  # by their number of threads: torch has one for each thread that computes
_building = Lock()  # a pool


def _workers() -> ThreadPoolExecutor:
    """As many threads as torch may use, each of which computes with one. RuntimeError if they cannot be started."""
    threads = torch.get_num_threads()
    with _building:
        if threads not in _pools:
            _pools[threads] = _new_pool(threads)
        return _pools[threads]


def _new_pool(threads: int) -> ThreadPoolExecutor:
    barrier = Barrier(threads)
    pool = ThreadPoolExecutor(threads, "expert", initializer=_use_one_thread)
    try:
        list(pool.map(lambda _: barrier.wait(), range(threads)))  # starts all of them
    except BaseException:
        barrier.abort()  # or those that have started would wait for ever
        raise
    finally:
        torch.set_num_threads(threads)  # what a thread sets is the number of those that start later, too
    return pool


def _use_one_thread() -> None:
    torch.get_num_threads()  # the first call of a thread gives it the number that was set last
    torch.set_num_threads(1)


def _forget_workers() -> None:
    """Threads do not come along into a forked process, nor does who held the lock."""
    global _building
    _pools.clear()
    _building = Lock()


os.register_at_fork(after_in_child=_forget_workers)
