"""What stops a run says why and what helps, and leaves the run as it was."""

import errno
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

from dit_moe import checkpoint
from dit_moe.config import ConfigError
from dit_moe.training import Hook, TrainingError
from tests.training.tiny_run import FAMILIES, log, to_latents

pytestmark = pytest.mark.parametrize("family", ["DiT"], indirect=True)  # none of it depends on what is trained


def poisoned(at, value=math.nan):
    """A preparation that spoils the rows of the data set whose first pixel sum says so."""

    def prepare(raw, random):
        batch = to_latents(raw, random)
        batch["latents"][at % len(batch["latents"])] = value
        return batch

    return prepare


def diverging(family, after):
    """An objective whose loss overflows from some step on."""
    usual, calls = FAMILIES[family].objective(10), []

    def objective(model, batch, random):
        calls.append(1)
        terms = usual(model, batch, random)
        return terms | {"loss": terms["loss"] * (math.inf if len(calls) > after else 1)}

    return objective


def test_a_diverging_loss_stops_before_the_update_and_says_where(build, family, tmp_path):
    trainer = build(tmp_path, objective=diverging(family, after=12), p0=0.7, micro_batch=None)
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith("step 13: loss=inf, total_loss=inf, ")
    assert "the weights were not touched" in message
    assert ", ".join(map(str, trainer.prefetcher.batches.batch(12))) in message
    assert "lower train.lr" in message
    assert trainer.step == 12
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step_00000010"]


LOWER = "lower train.lr, lengthen train.warmup_steps or set train.grad_clip"


@pytest.fixture(scope="module")
def diverged(build, family, tmp_path_factory):
    """A run whose loss overflowed in step 7, after the checkpoint of step 5, and what it said."""
    run = tmp_path_factory.mktemp("diverged")
    with pytest.raises(TrainingError) as caught:
        build(run, objective=diverging(family, after=6), p0=0.7, checkpoint_every=5, log_every=4).train()
    return run, str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("lr", 1e-4), ("warmup_steps", 100), ("grad_clip", 0.5)])
def test_the_advice_after_an_overflow_can_be_followed_and_is_recorded(build, tmp_path, diverged, capsys, name, value):
    run, advice = diverged
    assert advice.endswith(f"the data is finite, so {LOWER}: the same command with that goes on from step 5")
    shutil.copytree(run, tmp_path / "run")
    before = {"lr": 1e-3, "warmup_steps": 0, "grad_clip": None}[name]
    advised = {"p0": 0.7, "checkpoint_every": 2, "log_every": 4, name: value}
    build(tmp_path / "run", steps=6, **advised).train()
    told = capsys.readouterr().err
    assert "goes on from step 5, from now on with train.steps=" in told
    assert f"train.{name}={value} (was {before})" in told
    build(tmp_path / "run", steps=7, **advised).train()
    changes = [{"step": 5, f"train.{name}": [before, value]}]
    assert checkpoint.open_checkpoint(tmp_path / "run").state["changes"] == changes
    assert [line.get("changes") for line in log(tmp_path / "run")] == [None, changes, None]
    assert log(tmp_path / "run")[-1]["lr"] == pytest.approx({"lr": 1e-4, "warmup_steps": 7e-5}.get(name, 1e-3))


def test_weights_that_a_checkpoint_holds_and_that_fail_are_to_be_left_behind(build, family, diverged, tmp_path):
    run = shutil.copytree(diverged[0], tmp_path / "run")
    for deleted, then in ((None, "goes on from step 5"), ("step_00000005", "starts anew")):
        if deleted:
            shutil.rmtree(run / "checkpoints" / deleted)
        build(run, steps=10 if deleted else 6, p0=0.7, checkpoint_every=10).train()
        newest = checkpoint.latest(run)
        with pytest.raises(TrainingError) as caught:
            build(run, objective=diverging(family, after=0), p0=0.7).train()
        assert str(caught.value).endswith(
            f"{LOWER}, and delete {newest}, which holds the weights that failed: the same command then {then}"
        )
        shutil.rmtree(newest)


def test_an_update_that_leaves_the_numbers_is_not_saved_and_the_run_starts_anew(build, tmp_path):
    with pytest.raises(TrainingError) as caught:
        build(tmp_path, lr=1e38, eps=1e-30, p0=0.7, checkpoint_every=1, weight_decay=1e3).train()
    assert str(caught.value).startswith("step 1: its update made weights that are not finite (")
    assert str(caught.value).endswith(
        f"so it is not saved; {LOWER}: the same command with that starts anew, as nothing was saved yet"
    )
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_named(build, tmp_path, value):
    trainer = build(tmp_path, prepare_batch=poisoned(3, value), p0=0.7, micro_batch=16)
    with pytest.raises(TrainingError, match=r"^step 1: ") as caught:
        trainer.train()
    batch = trainer.prefetcher.batches.batch(0)
    assert f"rows {batch[3]}, {batch[19]} of the data set are not finite themselves" in str(caught.value)
    assert checkpoint.latest(tmp_path) is None


def test_what_a_hook_refuses_is_a_failure_in_the_middle_after_the_checkpoint(build, tmp_path):
    def hook(step, model):
        raise ValueError("the samples are not finite")

    trainer = build(tmp_path, hooks=[Hook(every=10, call=hook)])
    with pytest.raises(TrainingError, match="stopped after step 10: the samples are not finite"):
        trainer.train()
    assert checkpoint.open_checkpoint(tmp_path).step == 10


def test_running_out_of_memory_names_the_remedy(build, tmp_path):
    def objective(model, batch, random):
        return {"loss": torch.empty(2**48)}  # 1 PiB

    trainer = build(tmp_path, objective=objective, p0=0.7, micro_batch=8)
    with pytest.raises(TrainingError, match=r"step 1: out of memory; lower train.micro_batch \(now 8\)"):
        trainer.train()


def test_a_full_disk_ends_the_run_with_the_earlier_checkpoint_whole(build, tmp_path, monkeypatch):
    build(tmp_path, steps=5).train()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(TrainingError, match=r"stopped after step 10: .*No space left on device"):
        build(tmp_path).train()
    assert checkpoint.open_checkpoint(tmp_path).step == 5


def test_a_run_folder_that_cannot_be_written_is_refused_before_any_work(build, tmp_path):
    (tmp_path / "file").write_text("not a folder")  # permissions would not bind root
    trainer = build(tmp_path / "file" / "run")
    with pytest.raises(ValueError, match=r"file/run cannot be written \(Not a directory\); choose another folder"):
        trainer.train()
    assert trainer.prefetcher.dataset.asked == []


@pytest.mark.parametrize(
    ("name", "put"),
    [
        ("log.jsonl", Path.mkdir),
        ("log.jsonl", os.mkfifo),
        ("evaluations.jsonl", lambda path: path.symlink_to("/nowhere/file")),
        ("trackers.json", os.mkfifo),
        ("config.yaml", Path.mkdir),
        ("checkpoints", Path.touch),
        ("checkpoints", os.mkfifo),
        ("checkpoints", lambda path: path.symlink_to("/nowhere/folder")),
    ],
)
def test_what_is_in_place_of_a_file_of_the_run_or_of_its_checkpoints_is_refused(build, tmp_path, name, put):
    put(tmp_path / name)
    trainer = build(tmp_path)
    with pytest.raises(ValueError, match=rf"{name} is .*; move it away$"):
        trainer.train()
    assert trainer.prefetcher.dataset.asked == [] and [path.name for path in tmp_path.iterdir()] == [name]


def test_a_tracker_without_its_package_says_how_to_install_it(build, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(ConfigError, match=r"^train.trackers=wandb is not installed; pip install '?wandb"):
        build(tmp_path, trackers=("wandb",))
    assert not list(tmp_path.iterdir())


def test_a_callers_choice_of_deterministic_kernels_is_left_alone(build, tmp_path):
    torch.use_deterministic_algorithms(True)
    try:
        build(tmp_path)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("setting", "value", "wanted"),
    [
        ("USE_FSDP", "true", r"=true, but train.parallel .* --use_fsdp"),
        ("USE_DEEPSPEED", "true", r"=true, but train.parallel .* --use_deepspeed"),
        ("USE_PARALLELISM_CONFIG", "true", r"=true, but train.parallel"),
        ("DYNAMO_BACKEND", "EAGER", r"=EAGER, but train.compile says.*; launch without --dynamo_backend and with"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", r"=4, but train.batch_size says what a step takes"),
        (
            "MIXED_PRECISION",
            "fp16",
            r"=fp16, but train.mixed_precision=fp32 means fp32 here; launch without --mixed_prec",
        ),
        ("USE_CPU", "maybe", r"=maybe must be true or false"),
        ("TORCH_DEVICE", "meta", r"=meta, but this computes on cpu; unset it"),
    ],
)
def test_what_accelerate_is_set_to_do_and_the_config_decides_is_refused(
    build, tmp_path, monkeypatch, setting, value, wanted
):
    monkeypatch.setenv(f"ACCELERATE_{setting}", value)
    with pytest.raises(ConfigError, match=rf"^ACCELERATE_{setting}{wanted}"):
        build(tmp_path, parallel="fsdp2", mixed_precision="fp32")


def test_what_accelerate_launch_sets_when_it_is_asked_for_nothing_is_taken(build, tmp_path, monkeypatch):
    for name, value in (
        ("DYNAMO_BACKEND", "NO"),
        ("MIXED_PRECISION", "no"),
        ("USE_CPU", "False"),
        ("USE_FSDP", "false"),
    ):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    build(tmp_path)


ALONE = {"num_processes": 1, "device": torch.device("mps")}
ONE_OF_TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        (ONE_OF_TWO, "WORLD_SIZE=2 processes were launched, but they cannot form a group on mps"),
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE=2 is set, but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; launch with torch",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two must be a whole number"),
        ({"RANK": "1"}, "RANK=1 is set, but not WORLD_SIZE; launch with torchrun"),
        (ONE_OF_TWO | {"RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2 processes were started by MPI"),
    ],
)
def test_processes_that_cannot_form_a_group_are_refused(build, tmp_path, monkeypatch, environment, wanted):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dit_moe.distributed._meet", lambda launched: {})
    monkeypatch.setattr("dit_moe.distributed.PartialState", lambda **kwargs: type("Alone", (), ALONE)())
    with pytest.raises(ConfigError, match=f"^{wanted}"):
        build(tmp_path)


def test_a_process_without_a_device_of_its_own_is_refused(build, tmp_path, monkeypatch):
    for name, value in (ONE_OF_TWO | {"LOCAL_RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 1)
    with pytest.raises(
        ConfigError, match=r"^LOCAL_RANK=1 has no device: this machine shows 1, counted from 0; launch 1"
    ):
        build(tmp_path)


def test_hidden_devices_and_processes_that_train_alone_are_said(build, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    build(tmp_path, steps=1, p0=0.7).train()
    said = capsys.readouterr().err
    assert "CUDA_VISIBLE_DEVICES= leaves no GPU to train on" in said and "srun has started 2 processes, each" in said
