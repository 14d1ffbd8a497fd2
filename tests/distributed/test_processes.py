"""How processes come together and part, and what they say of each other's end."""

import pytest
import torch

from dit_moe import distributed
from dit_moe.training.devices import remarks
from tests.cli.conftest import CONFIG, SMALL, cli

AGAIN = "look for its own message, then run the same command again, which goes on from what was saved"


@pytest.fixture
def folder(processes):
    return processes


def ending(folder, name):
    """A process's exit code and its last line, with nothing of Python's or C++'s stack before it."""
    words = (folder / f"{name}.txt").read_text()
    assert "Traceback" not in words and "frame #" not in words
    return int((folder / f"{name}.code").read_text()), words.strip().splitlines()[-1]


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_on_the_cpu_leave_their_group_before_the_interpreter_ends(folder, rank):
    # Otherwise gloo's threads may let go of a tensor while Python is being torn down, which now and then aborts one.
    assert (folder / f"together_{rank}.txt").read_text().split() == ["True", "False"]
    assert (folder / f"together_{rank}.code").read_text() == "0"


def test_one_that_waits_for_the_others_says_how_many_came(folder):
    code, words = ending(folder, "alone_0")
    assert code == 1
    assert words.startswith("failed: process 0 of 2: only 1 of 2 processes came within 1 s; look for the messages of")
    assert words.endswith("start all of them again with the same command")


def test_without_the_first_one_the_others_wait_no_longer(folder):
    code, words = ending(folder, "without_first_1")
    assert code == 1
    assert words.startswith("failed: process 1 of 2: process 0, or its launcher, did not come to localhost:")
    assert " within 1 s; look for the messages of the others" in words


def test_one_that_its_launcher_stops_while_it_waits_says_what_that_may_mean(folder):
    problem = "SIGTERM, which launchers send when another process has ended"
    assert ending(folder, "told_to_stop_0") == (143, f"stopped: process 0 of 2: {problem}; {AGAIN}")


def test_one_whose_peer_dies_in_training_says_so_and_the_same_command_goes_on(folder, capsys):
    assert (folder / "training_1.code").read_text() == "-9"
    code, words = ending(folder, "training_0")
    assert code == 1
    assert words.startswith("failed: process 0 of 2: another process ended, or did not answer (") and "peer" in words
    assert words.endswith(f"); {AGAIN}")
    capsys.readouterr()
    assert cli("train", CONFIG, "--run", folder / "run", *SMALL) == 0
    assert "goes on from step 2" in capsys.readouterr().err


def test_a_shell_in_which_a_cluster_set_the_number_of_processes_waits_for_none(monkeypatch, capsys):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):  # no LOCAL_RANK, which launchers set
        monkeypatch.setenv(name, {"MASTER_ADDR": "localhost", "RANK": "0"}.get(name, "2"))
    monkeypatch.setattr(distributed, "_meet", None)
    assert cli("table", "--published", "all") == 0
    assert capsys.readouterr().out


def test_a_gpu_without_float64_is_left_for_the_cpu_and_that_is_said(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda **_: torch.device("mps"))
    assert distributed.use_cpu()
    assert "this Mac's GPU has no float64" in " ".join(remarks())
