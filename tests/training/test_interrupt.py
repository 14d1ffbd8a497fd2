import os
import signal
import threading
import time

import pytest

from dit_moe.training.interrupt import SIGNALS, InterruptWatch


def send(signum):
    os.kill(os.getpid(), signum)
    time.sleep(0.01)  # Python runs handlers between two of its instructions


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR1], ids=lambda signum: signum.name)
def test_the_first_signal_is_remembered_and_its_echo_ignored(capfd, first):
    before = [signal.getsignal(each) for each in SIGNALS]
    with InterruptWatch() as watch:
        assert watch.signum == 0
        send(first)
        send(first)
        send(signal.SIGINT)
        assert watch.signum == first
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert capfd.readouterr().err.count("a second Ctrl-C stops at once") == 1


def test_a_second_ctrl_c_kills():
    child = os.fork()
    if child == 0:
        with InterruptWatch() as watch:
            send(signal.SIGINT)
            watch._first -= 2
            send(signal.SIGINT)
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGINT


def test_outside_of_the_main_thread_nothing_is_installed():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with InterruptWatch():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
