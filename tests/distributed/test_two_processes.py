"""Two processes over gloo, started as a user starts them, against one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

from dit_moe import checkpoint

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of two processes in it (see the script), and "one", the same 20 steps on one."""
    folder = tmp_path_factory.mktemp("runs")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(Path(tiny_run.__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([*launcher, SCRIPT, folder], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tiny_run.build(folder / "one").train()
    return folder


@pytest.fixture
def ranks(folder):
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_train_like_one(folder):
    for one, two in zip(tiny_run.log(folder / "one"), tiny_run.log(folder / "two"), strict=True):
        assert two["step"] == one["step"]
        for key in ("loss", "grad_norm", "p", "active", "aux_balance"):
            assert two[key] == pytest.approx(one[key], rel=1e-5)


def test_both_ranks_hold_the_same_thresholds_weights_and_ema_bit_for_bit(ranks):
    first, second = (rank["digests"] for rank in ranks)
    assert first == second
    assert any(name.endswith("controller.p") for name in first)


def test_a_checkpoint_saved_by_two_processes_goes_on_in_one(folder, tmp_path):
    run = shutil.copytree(folder / "two", tmp_path / "run")
    shutil.rmtree(checkpoint.latest(run))
    trainer = tiny_run.build(run)
    trainer.train()
    assert len(trainer.dataset.asked) == 10
    for one, mixed in zip(tiny_run.log(folder / "one"), tiny_run.log(run), strict=True):
        assert mixed["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_a_batch_that_does_not_divide_is_refused_by_both(folder, ranks):
    for rank in ranks:
        assert rank["uneven"].startswith("ConfigError: train.batch_size=31 cannot be shared equally by 2 processes")
    assert not (folder / "uneven").exists()


def test_a_nan_on_one_process_stops_both_before_the_update(folder, ranks):
    for rank in ranks:
        assert rank["nan"].startswith("TrainingError: step 1: loss=nan")
        assert f"rows {', '.join(map(str, rank['second_half']))} of the data set are not finite" in rank["nan"]
    assert checkpoint.latest(folder / "nan") is None


def test_a_signal_to_one_process_stops_both_after_the_same_step(folder, ranks):
    for rank in ranks:
        assert rank["signal"].startswith("Interrupted:")
        assert "saved at step 7;" in rank["signal"]
    assert checkpoint.open_checkpoint(folder / "signal").step == 7


def test_hooks_are_called_on_both(ranks):
    assert [rank["hooks"] for rank in ranks] == [[10, 20], [10, 20]]


def test_processes_that_see_different_run_folders_are_refused(ranks):
    for rank in ranks:
        assert rank["split"].startswith("ValueError: ")
        assert "is at step 7 for one process and at step 0 for another; put it on a disk" in rank["split"]


def test_a_run_in_use_is_refused_by_both(ranks):
    for rank in ranks:
        assert rank["in_use"].startswith("ValueError: ")
        assert "is being trained by another process" in rank["in_use"]


def test_what_one_process_refuses_is_refused_by_both(ranks):
    for rank, name in zip(ranks, ("ValueError", "ConfigError"), strict=True):
        assert rank["refused"] == [f"{name}: train.lr=0 only here", "SamplingError: only here"]
