"""Independent pieces of work shared out over threads that compute with one thread each."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch


def over_threads(costs: list[int], work: Callable[[list[int]], None]) -> None:
    """Call `work` in each thread with the numbers of its items. Who gets which depends on the costs alone."""
    threads = min(torch.get_num_threads(), len(costs))
    # What watches operations, as a counter of FLOPs does, sees those of its own thread alone.
    if threads <= 1 or torch._C._len_torch_dispatch_stack():
        work(list(range(len(costs))))
    else:
        # Each thread has its own gradient mode, and what is made in inference mode is written in inference mode alone.
        without = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad
        list(_workers().map(without()(work), shared_out(costs, threads)))


def shared_out(costs: list[int], threads: int) -> list[list[int]]:
    """Numbers of items, so that each thread's costs are about equal: the dearest first, to who has least."""
    loads = [0] * threads
    shares: list[list[int]] = [[] for _ in range(threads)]
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        thread = loads.index(min(loads))
        loads[thread] += costs[item]
        shares[thread].append(item)
    return shares


_pool: ThreadPoolExecutor | None = None
_pool_threads = 0


def _workers() -> ThreadPoolExecutor:
    """As many threads as torch may use, each of which computes with one."""
    global _pool, _pool_threads
    threads = torch.get_num_threads()
    if _pool is None or _pool_threads != threads:
        barrier = Barrier(threads)
        _pool = ThreadPoolExecutor(threads, "expert", initializer=_use_one_thread)
        try:
            list(_pool.map(lambda _: barrier.wait(), range(threads)))  # starts all of them
        except BaseException:
            barrier.abort()  # or those that have started would wait for ever
            _pool = None
            raise
        torch.set_num_threads(threads)  # what a thread sets is the number of those that start later, too
        _pool_threads = threads
    return _pool


def _use_one_thread() -> None:
    torch.get_num_threads()  # the first call of a thread gives it the number that was set last
    torch.set_num_threads(1)


def _forget_workers() -> None:
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_workers)  # threads do not come along
