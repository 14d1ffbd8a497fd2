import errno
import fcntl
import json
import os
import signal

import pytest
import torch

from dit_moe import checkpoint
from dit_moe.config import OF_A_RUN, ConfigError
from dit_moe.distributed import locked
from dit_moe.training import Hook, Interrupted, TrainingError
from dit_moe.training.config import FREE
from tests.folders import contents
from tests.scripts import said
from tests.training import tiny_run
from tests.training.tiny_run import bits, log

ONE_FAMILY = pytest.mark.parametrize("family", ["DiT"], indirect=True)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def killed(tiny_data, tmp_path_factory):
    """Runs by family, each of which died of kill -9: between two checkpoints, and while it saved the second one."""
    folder = tmp_path_factory.mktemp("killed")
    tiny_run.tokens(tiny_data)  # made before the two need it
    said(tiny_run.__file__, tiny_data, folder, "LM=step:15", "DiT=state.json:2")
    return folder


def test_killed_between_checkpoints_or_while_it_saves_and_resumed_equals_unbroken_bit_for_bit(
    build, family, killed, unbroken
):
    run = killed / family
    assert log(run)[-1]["step"] >= 15, "the log has gone further than the checkpoint"
    assert checkpoint.open_checkpoint(run).step == 10
    resumed = build(run)
    resumed.train()
    assert resumed.prefetcher.dataset.asked == [resumed.prefetcher.batches.batch(step) for step in range(10, 20)]
    assert bits(run, 20) == bits(unbroken, 20) and log(run) == log(unbroken)
    assert names(run) == ["step_00000010", "step_00000020"]


@ONE_FAMILY
def test_a_run_whose_checkpoint_holds_p_goes_on_from_the_same_thresholds_in_weights_and_average(
    build, tmp_path, unbroken
):
    saved = checkpoint.open_checkpoint(unbroken)
    parts = {part: saved.weights(part) for part in ("model", "ema", "optimizer")}
    for state in (parts["model"], parts["ema"]):
        for name in [name for name in state if name.endswith("controller.u")]:
            prefix = name.removesuffix("u")
            u, u0 = state.pop(name), state.pop(f"{prefix}u0")
            del state[f"{prefix}reached"]
            state |= {f"{prefix}p": -torch.expm1(-u).float(), f"{prefix}p0": -torch.expm1(-u0).float()}
    facts = {name: value for name, value in saved.state.items() if name not in ("format", "torch", "files")}
    config_yaml = (saved.folder / "config.yaml").read_text()
    checkpoint.save(tmp_path, parts=parts, state=facts, config_yaml=config_yaml, keep=1)
    trainer = build(tmp_path)
    trainer.train()  # is finished, once it is read
    for part, module in (("model", trainer.model), ("ema", trainer.ema.module)):
        before = saved.weights(part)
        for name, tensor in checkpoint.state_of(module).items():
            near = 1e-6 if name.endswith(("controller.u", "controller.u0")) else 0  # p was kept in fp32
            torch.testing.assert_close(tensor, before[name], rtol=near, atol=0, msg=name)


@ONE_FAMILY
def test_a_run_that_died_before_its_first_checkpoint_starts_anew(build, tmp_path, unbroken):
    tmp_path.joinpath("config.yaml").write_text(f"{OF_A_RUN}seed: 7\n")
    tmp_path.joinpath("log.jsonl").write_text('{"step": 5}\n')
    build(tmp_path).train()
    assert bits(tmp_path, 20) == bits(unbroken, 20)
    assert log(tmp_path) == log(unbroken)


@pytest.mark.parametrize(
    "family, signum", [("DiT", signal.SIGTERM), ("DiT-modern", signal.SIGINT)], indirect=["family"]
)
def test_a_signal_saves_the_step_under_way_and_the_run_goes_on_from_there(build, tmp_path, unbroken, signum):
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted, match="saved at step 8; run the same command to go on") as caught:
        build(tmp_path, hooks=[Hook(every=7, call=lambda *_: os.kill(os.getpid(), signum))]).train()
    assert caught.value.signum == signum
    assert signal.getsignal(signum) is before
    assert names(tmp_path) == ["step_00000008"]
    build(tmp_path).train()
    assert bits(tmp_path, 20) == bits(unbroken, 20)
    assert log(tmp_path) == log(unbroken), "the line of step 10 is the mean of 6 to 10"


def test_a_finished_run_returns_at_once_and_touches_nothing(build, unbroken, capsys):
    before = contents(unbroken)
    trainer = build(unbroken)
    trainer.train()
    assert trainer.prefetcher.dataset.asked == []
    assert contents(unbroken) == before
    assert "is finished: 20 steps; raise train.steps to go on" in capsys.readouterr().err.replace("\n", " ")


def test_what_may_change_on_resume_changes_no_bit_but_for_steps_micro_batches_and_compiling(
    build, unbroken, tmp_path, tracked
):
    free = {
        "parallel": "fsdp2",
        "deterministic": True,
        "workers": 1,
        "checkpoint_every": 7,
        "keep_checkpoints": 3,
        "log_every": 3,
        "sample_every": 2,
        "trackers": ("tensorboard",),
        "run_name": "mine",
        "run_group": "tries",
    }
    assert {*free, "steps", "micro_batch", "compile"} == set(FREE)  # the last two round otherwise
    build(tmp_path, steps=10).train()
    try:
        build(tmp_path, recompute=True, **free).train()
    finally:
        torch.use_deterministic_algorithms(False)
    assert bits(tmp_path, 20) == bits(unbroken, 20)
    assert "changes" not in checkpoint.open_checkpoint(tmp_path).state


@ONE_FAMILY
def test_steps_and_intervals_may_change_on_resume(build, tmp_path):
    build(tmp_path, steps=5).train()
    settings = tmp_path / "config.yaml"
    settings.write_text(settings.read_text().removeprefix(OF_A_RUN))  # as earlier versions wrote it
    build(tmp_path, steps=7, log_every=1, checkpoint_every=100, micro_batch=16, sample_every=3).train()
    assert [line["step"] for line in log(tmp_path)] == [5, 6, 7]
    assert checkpoint.open_checkpoint(tmp_path).config()["train"]["steps"] == 7
    assert "steps: 7" in (tmp_path / "config.yaml").read_text()


def test_another_config_is_refused_with_the_keys_that_differ_and_nothing_is_overwritten(build, tmp_path):
    build(tmp_path, steps=5).train()
    before = contents(tmp_path)
    with pytest.raises(ConfigError) as caught:
        build(tmp_path, steps=7, weight_decay=0.1, batch_size=16).train()
    assert caught.value.path == "train.batch_size"
    assert f"=16 differs from the run in {tmp_path}, which has 32, as do train.weight_decay;" in str(caught.value)
    assert contents(tmp_path) == before


@ONE_FAMILY
@pytest.mark.parametrize("name", ["config.yaml", "log.jsonl"])
def test_no_file_of_a_user_is_taken_for_that_of_a_run(build, tmp_path, name):
    (tmp_path / name).write_text("seed: 0  # my own\n")
    with pytest.raises(ValueError, match=f"{name} is there already, and nothing says that dit-moe wrote it; move it"):
        build(tmp_path, steps=5).train()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["seed: 0  # my own\n"]


def test_a_disk_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        pass
    assert "cannot be locked (Function not implemented); start nothing else" in capsys.readouterr().err


@ONE_FAMILY
def test_training_holds_its_run_to_the_end_and_lets_it_go_even_when_it_fails(build, tmp_path):
    def hook(step, model):
        with (tmp_path / ".lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        raise ValueError("enough")

    with pytest.raises(TrainingError, match="enough"):
        build(tmp_path, hooks=[Hook(every=20, call=hook)]).train()
    assert not (tmp_path / ".lock").exists()


@ONE_FAMILY
def test_another_precision_machine_or_log_than_before_is_announced(build, tmp_path, capsys):
    build(tmp_path, steps=5).train()
    assert checkpoint.open_checkpoint(tmp_path).state["precision"] == "fp32"
    build(tmp_path, steps=6).train()
    note = "was trained in bf16 so far, here train.mixed_precision=auto means fp32"
    said = capsys.readouterr().err
    assert note not in said and "bit for bit" not in said and "lacks" not in said
    state = checkpoint.latest(tmp_path) / "state.json"
    other = {"precision": "bf16", "torch": "1.0", "processes": 2, "implementation": "grouped"}
    state.write_text(json.dumps(json.loads(state.read_text()) | other))
    (tmp_path / "log.jsonl").unlink()
    build(tmp_path, steps=7).train()
    said = capsys.readouterr().err
    assert said.count(note) == 1
    assert "was trained with torch 1.0, processes 2, implementation grouped so far, here with torch" in said
    assert "implementation by_expert: it goes on, but not bit for bit" in said
    assert "log.jsonl lacks the line of step 6, with which it ended when that was saved" in said
