"""Two processes over gloo that train from encoded latents, against one."""

import shutil
from pathlib import Path

import pytest

from dit_moe import checkpoint
from dit_moe.training.log import read_log
from tests.cli.conftest import cli
from tests.cli.test_latents import CONFIG, SMALLER

STEPS = 10
OVERRIDES = [
    *SMALLER,
    "model.name=DiT-custom/2-4E2A",
    "train.batch_size=16",  # of 50 images and their mirrored ones: into the second epoch
    "train.checkpoint_every=5",
    "train.lr=1e-3",
    f"train.steps={STEPS}",
]


def words(folder: Path, run: Path, *more: str) -> list[str]:
    """What follows `train`, for the latents in `folder`."""
    encoded = [f"data.path={folder / 'latents'}", "encode={images: {name: digits, size: 16}, flips: true}"]
    return [CONFIG, *OVERRIDES, *encoded, f"first_stage.model={folder / 'autoencoder'}", *more, "--run", str(run)]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_log(run / "log.jsonl")]


@pytest.fixture(scope="module")
def folder(processes):
    """Latents, and runs on them: of one process ("one"), and of two for each way of sharing the model."""
    folder = processes / "latents"
    assert cli("train", *words(folder, folder / "one")) == 0
    return folder


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_train_on_latents_like_one(folder, parallel):
    one, two = losses(folder / "one"), losses(folder / parallel)
    assert len(one) == STEPS and len(set(one)) == STEPS
    assert two == pytest.approx(one, rel=1e-6)


def test_a_run_on_latents_in_two_slices_goes_on_in_one_process(folder, tmp_path):
    run = shutil.copytree(folder / "fsdp2", tmp_path / "run")
    shutil.rmtree(checkpoint.latest(run))
    assert checkpoint.open_checkpoint(run).step == STEPS // 2
    assert cli("train", *words(folder, run)) == 0
    assert losses(run) == pytest.approx(losses(folder / "one"), rel=1e-6)
