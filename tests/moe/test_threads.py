"""Work shared out over threads: which threads there are, and when they end."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from dit_moe.moe.threads import over_threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def workers(number: int) -> set[threading.Thread]:
    """Who does the work of a thread that may use so many; each waits for the others."""
    torch.set_num_threads(number)
    seen, all_are_there = set(), threading.Barrier(number, timeout=60)

    def work(share: list[int]) -> None:
        all_are_there.wait()
        assert torch.get_num_threads() == 1
        seen.add(threading.current_thread())

    over_threads([1] * number, work)
    return seen


def numbers_of_new_threads() -> list[int]:
    found: list[int] = []
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    return found


def test_a_thread_that_may_use_another_number_of_threads_takes_no_workers_away():
    two, three = workers(2), workers(3)
    assert len(two) == 2 and len(three) == 3 and not two & three
    assert workers(2) == two and workers(3) == three
    assert numbers_of_new_threads() == [3]  # and not the workers' own


def test_an_error_is_raised_when_all_workers_have_ended():
    done = []

    def work(share: list[int]) -> None:
        if share == [0]:
            raise ValueError("of the first")
        time.sleep(0.1)
        done.append(share)

    with pytest.raises(ValueError, match="of the first"):
        over_threads([1, 1], work)
    assert done == [[1]]


def test_where_no_thread_can_be_started_the_work_is_done_all_the_same_and_that_is_said_once(monkeypatch, capsys):
    started, start = [], threading.Thread.start

    def start_one(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(start(thread))

    torch.set_num_threads(4)  # for which there are no workers yet
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_one)
        seen: list[int] = []
        over_threads([1] * 4, seen.extend)
        over_threads([1] * 4, lambda share: None)
    assert (
        capsys.readouterr().err.count("4 threads were to compute the experts, and not all can be started (can't") == 1
    )
    assert sorted(seen) == [0, 1, 2, 3] and numbers_of_new_threads() == [4]
    assert len(workers(4)) == 4


def test_a_thread_that_outlives_the_main_one_goes_on_without_workers(monkeypatch):
    assert len(workers(2)) == 2
    monkeypatch.setattr("concurrent.futures.thread._shutdown", True)  # as when the main one has ended
    for number in (2, 5):  # of workers that were there, and that would be new
        torch.set_num_threads(number)
        seen: list[int] = []
        over_threads([1] * number, seen.extend)
        assert sorted(seen) == list(range(number))


def test_a_forked_process_has_threads_of_its_own_even_if_another_thread_was_starting_some():
    program = """
import os, torch
from dit_moe.moe import threads
torch.set_num_threads(2)
seen = []
threads.over_threads([1, 1], seen.extend)
with threads._building:
    child = os.fork()
    if not child:
        threads.over_threads([1, 1], seen.extend)
        os._exit(0 if sorted(seen) == [0, 0, 1, 1] else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=240)
