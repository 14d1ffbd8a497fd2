"""Commands whose output goes into a pipe that loses its reader."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from dit_moe import checkpoint
from tests.cli.conftest import SMALL, cli

WORDS = ["train", "digits", *SMALL, "train.log_every=1", "train.checkpoint_every=100000"]


def started(tmp_path, *more: str, unbuffered: bool = False) -> subprocess.Popen[bytes]:
    """A training that says all into one pipe, as ``2>&1 |`` has it."""
    python = [sys.executable, "-u"] if unbuffered else [sys.executable]
    command = [*python, "-m", "dit_moe.cli", *WORDS, *more, "--run", str(tmp_path / "run")]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipe)


def read_until_it_trains(process: subprocess.Popen[bytes]) -> None:
    for line in process.stdout:
        if line.startswith(b"step "):
            break
    process.stdout.close()


@pytest.mark.parametrize("unbuffered", [False, True])
def test_ctrl_c_that_ends_the_reader_first_still_saves_the_run(tmp_path, unbuffered):
    process = started(tmp_path, "train.steps=100000", unbuffered=unbuffered)
    read_until_it_trains(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    saved = checkpoint.latest(tmp_path / "run")
    assert saved is not None and checkpoint.step_of(saved) >= 1


def test_a_training_whose_reader_goes_away_goes_on_to_its_end(tmp_path):
    process = started(tmp_path, "train.steps=30")
    read_until_it_trains(process)
    assert process.wait(60) == 0
    assert checkpoint.step_of(checkpoint.latest(tmp_path / "run")) == 30


def test_a_training_says_which_it_is_and_a_longer_one_and_samples_in_between_how_far(tmp_path, capsys):
    run = tmp_path / "run"
    assert cli(*WORDS, "train.steps=4", "--run", run) == 0
    experts = "model.moe.implementation=auto means grouped"
    assert f"training {run}: 4 steps; {experts}\n" in capsys.readouterr().err
    assert cli("sample", run) == 0
    assert "is at step" not in capsys.readouterr().err
    assert cli(*WORDS, "train.steps=5", "train.warmup_steps=1", "--run", run) == 0
    told = capsys.readouterr().err
    assert f"training {run}: 5 steps; {experts}\n" in told
    assert "goes on from step 4, from now on with train.steps=5 (was 4), train.warmup_steps=1 (was 0)" in told


def test_samples_of_a_run_that_is_not_finished_say_how_far_it_is(tmp_path, capsys):
    run = tmp_path / "run"
    assert cli(*WORDS, "train.steps=3", "train.checkpoint_every=2", "--run", run) == 0
    shutil.rmtree(run / "checkpoints" / "step_00000003")
    capsys.readouterr()
    assert cli("sample", run, "--out", tmp_path / "out") == 0
    assert f"note: {run} is at step 2 of 3\n" in capsys.readouterr().err
    assert cli("sample", run / "checkpoints" / "step_00000002", "--out", tmp_path / "named") == 0
    assert "is at step" not in capsys.readouterr().err
