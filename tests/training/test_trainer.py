import errno
import json
import math
from typing import ClassVar

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType
from tiny_run import DIGITS, FAMILIES, bits, log, to_latents

from dit_moe import checkpoint
from dit_moe.config import ConfigError
from dit_moe.moe import end_step, routers_of
from dit_moe.training import Hook, TrainingError
from dit_moe.training.sharding import placement


def test_micro_batches_give_the_same_update_and_as_many_controller_steps(build, tmp_path):
    build(tmp_path / "whole").train()
    for micro_batch in (8, 12):  # 12 leaves a smaller last one
        build(tmp_path / str(micro_batch), micro_batch=micro_batch).train()
        for whole, cut in zip(log(tmp_path / "whole"), log(tmp_path / str(micro_batch)), strict=True):
            assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-5)
            assert cut["active"] == pytest.approx(whole["active"], rel=1e-5)
            assert cut["p"] == pytest.approx(whole["p"], rel=1e-5)
        left, right = (
            checkpoint.open_checkpoint(tmp_path / run).weights("model") for run in ("whole", str(micro_batch))
        )
        for name in left:
            # Adam turns the rounding of a gradient near zero into a step of its own size; seen: 2e-6 of lr 1e-3 · 20.
            torch.testing.assert_close(left[name], right[name], rtol=0, atol=2e-5)


def test_training_learns_and_starts_at_the_target(build, tmp_path):
    trainer = build(tmp_path, steps=60, log_every=1, checkpoint_every=60)
    trainer.train()
    lines = log(tmp_path)
    assert sum(line["loss"] for line in lines[-10:]) < 0.85 * sum(line["loss"] for line in lines[:10])
    assert lines[0]["active"] == pytest.approx(2, abs=0.05)  # 512 tokens per layer, std 0.7 of each
    assert sum(line["active"] for line in lines) / 60 == pytest.approx(2, abs=0.03)


def test_a_line_of_the_log_says_everything(build, family, tmp_path):
    build(tmp_path, steps=3, log_every=2).train()
    first, last = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    unit, term = FAMILIES[family].unit, FAMILIES[family].term
    seen = (first["step"], first[unit.name], last["step"], last[unit.name])
    assert seen == (2, 64 * unit.per_row, 3, 96 * unit.per_row)
    wanted = {
        "loss",
        term,
        "lr",
        "grad_norm",
        f"{unit.name}_per_s",
        "p",
        "active",
        "aux_balance",
        "aux_dynamic",
        "layers",
    }
    assert wanted <= first.keys()
    assert {"active", "active_std", "theta", "p", "balance", "entropy"} <= first["layers"].keys()
    assert all(len(values) == 2 for values in first["layers"].values())
    assert "stop" not in first


def test_a_checkpoint_carries_the_controller_in_model_and_ema(build, tmp_path):
    trainer = build(tmp_path, steps=4, log_every=1)
    trainer.train()
    p = log(tmp_path)[-1]["p"]
    for part in ("model", "ema"):
        thresholds = [
            v for k, v in checkpoint.open_checkpoint(tmp_path).weights(part).items() if k.endswith("controller.p")
        ]
        assert [t.item() for t in thresholds] == [pytest.approx(p, rel=1e-6)] * 2
    assert [r.controller.p.item() for r in routers_of(trainer.ema.module)] == [t.item() for t in thresholds]


def test_bf16_trains_close_to_fp32_with_fp32_weights(build, tmp_path):
    for precision in ("fp32", "bf16"):
        trainer = build(tmp_path / precision, steps=10, mixed_precision=precision)
        trainer.train()
        AcceleratorState._reset_state(reset_partial_state=True)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    fp32, bf16 = (log(tmp_path / precision)[-1]["loss"] for precision in ("fp32", "bf16"))
    assert bf16 != fp32
    assert bf16 == pytest.approx(fp32, rel=0.02)  # bf16 keeps 8 bits


def test_one_process_that_shares_with_none_is_a_plain_run(build, tmp_path):
    build(tmp_path / "ddp", steps=5).train()
    build(tmp_path / "fsdp2", steps=5, parallel="fsdp2").train()
    assert bits(tmp_path / "ddp", 5) == bits(tmp_path / "fsdp2", 5)


def test_facts_are_kept_in_every_checkpoint(build, tmp_path):
    build(tmp_path, checkpoint_every=10).train()
    for folder in checkpoint.checkpoints(tmp_path):
        assert checkpoint.open_checkpoint(folder).state["class_names"] == list(DIGITS)


def test_clipping_bounds_the_norm_of_the_update(build, tmp_path):
    trainer = build(tmp_path, steps=1, grad_clip=1e-3, log_every=1)
    norms = []
    step = trainer.optimizer.step

    def spy():
        grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        step()

    trainer.optimizer.step = spy
    trainer.train()
    assert norms == [pytest.approx(1e-3, rel=1e-3)]
    assert log(tmp_path)[0]["grad_norm"] > 1e-2


def test_hooks_get_the_ema_model_in_evaluation_mode_without_gradients(build, tmp_path):
    calls = []

    def hook(step, model):
        calls.append((step, model.training, torch.is_grad_enabled(), any(p.requires_grad for p in model.parameters())))

    build(tmp_path, steps=5, hooks=[Hook(every=2, call=hook)]).train()
    assert calls == [(2, False, False, False), (4, False, False, False)]


def test_the_routers_report_only_in_steps_that_are_logged(build, tmp_path, monkeypatch):
    asked = []

    def spy(model, reduce, report=True):
        asked.append(report)
        return end_step(model, reduce, report=report)

    monkeypatch.setattr("dit_moe.training.trainer.end_step", spy)
    build(tmp_path, steps=5, log_every=2).train()
    assert asked == [False, True, False, True, True]
    assert all("active" in line for line in log(tmp_path))


class FakeTracker(GeneralTracker):
    """Stands in for TensorBoard's, which may not be installed."""

    name, requires_logging_directory, main_process_only = "tensorboard", True, True
    calls: ClassVar[list] = []

    def __init__(self, *args):
        super().__init__()

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.calls.append(("config", values))

    def log(self, values, step):
        self.calls.append((step, values))

    def finish(self):
        self.calls.append(("finished", {}))


def test_trackers_get_the_config_and_every_line_as_flat_numbers(build, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", FakeTracker)
    monkeypatch.setattr(FakeTracker, "calls", [])
    build(tmp_path, steps=4, log_every=2, trackers=("tensorboard",)).train()
    (first, config), (two, line), (four, _), (last, _) = FakeTracker.calls
    assert (first, two, four, last) == ("config", 2, 4, "finished")
    assert config["train/steps"] == 4
    assert line["loss"] == log(tmp_path)[0]["loss"]
    assert line["layers/p/1"] == log(tmp_path)[0]["layers"]["p"][1]
    assert all(isinstance(value, int | float) for value in line.values())


# -------------------------------------------------------------------------------------------------------- going wrong


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
    build(tmp_path / "good", steps=10).train()
    trainer = build(tmp_path / "bad", objective=diverging(family, after=12), p0=0.7, micro_batch=None)
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith("step 13: loss=inf, total_loss=inf, ")
    assert "the weights were not touched" in message
    assert ", ".join(map(str, trainer.feed.order.batch(12))) in message
    assert "lower train.lr" in message
    assert trainer.step == 12
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "bad")] == ["step_00000010"]


@pytest.mark.parametrize("family", ["DiT"], indirect=True)  # tokens are whole numbers
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_named(build, tmp_path, value):
    trainer = build(tmp_path, prepare_batch=poisoned(3, value), p0=0.7, micro_batch=16)
    with pytest.raises(TrainingError, match=r"^step 1: ") as caught:
        trainer.train()
    batch = trainer.feed.order.batch(0)
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
        raise torch.OutOfMemoryError("CUDA out of memory")

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
    assert trainer.feed.dataset.asked == []


def test_a_tracker_without_its_package_names_the_extra(build, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(ConfigError, match=r"^train.trackers=wandb needs .* pip install 'dit_moe\[wandb\]'"):
        build(tmp_path, trackers=("wandb",))
    assert not list(tmp_path.iterdir())


def test_a_callers_choice_of_deterministic_kernels_is_left_alone(build, tmp_path):
    torch.use_deterministic_algorithms(True)
    try:
        build(tmp_path)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("plugin", ["FSDP", "DEEPSPEED"])
def test_a_launcher_that_would_split_the_model_its_own_way_is_refused(build, tmp_path, monkeypatch, plugin):
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    with pytest.raises(
        ConfigError, match=rf"^ACCELERATE_USE_{plugin}=true, but train.parallel .* --use_{plugin.lower()}"
    ):
        build(tmp_path, parallel="fsdp2")


def test_processes_that_cannot_form_a_group_are_refused(build, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("dit_moe.processes.PartialState", lambda **kwargs: type("Alone", (), ALONE)())
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 processes were launched, but they cannot form a group on mps"):
        build(tmp_path)


ALONE = {"num_processes": 1, "device": torch.device("mps")}


@pytest.mark.parametrize(
    ("shape", "processes", "dimension"),
    [((8, 64, 32), 4, 0), ((8, 64, 32), 16, 1), ((3, 5, 32), 4, 2), ((3, 5, 7), 4, None), ((3, 64), 4, None)],
)
def test_experts_are_cut_where_every_process_gets_as_much(shape, processes, dimension):
    cut = placement(shape, processes)
    assert (cut and cut.dim) == dimension
