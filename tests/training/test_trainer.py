import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState

from dit_moe import checkpoint
from dit_moe.moe import MoEConfig, update_routers
from dit_moe.training import Hook
from dit_moe.training.devices import placement
from dit_moe.training.log import active_experts
from tests.training.tiny_run import FAMILIES, bits, log

ONE_FAMILY = pytest.mark.parametrize("family", ["DiT"], indirect=True)


def test_micro_batches_give_the_same_update_and_as_many_controller_steps(build, unbroken, tmp_path):
    for micro_batch in (8, 12):  # 12 leaves a smaller last one
        run = tmp_path / str(micro_batch)
        build(run, steps=10, micro_batch=micro_batch).train()
        for whole, cut in zip(log(unbroken)[:2], log(run), strict=True):
            for name in ("loss", "active", "p"):
                assert cut[name] == pytest.approx(whole[name], rel=1e-5)
        checkpoints = (each / "checkpoints" / "step_00000010" for each in (unbroken, run))
        left, right = (checkpoint.open_checkpoint(each).weights("model") for each in checkpoints)
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
    trainer, peaks = build(tmp_path, steps=3, log_every=2), []
    mean = trainer.training_step._mean
    trainer.training_step._mean = lambda values: peaks.append((agreed := mean(values))["active_peak"]) or agreed
    trainer.train()
    first, last = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    unit, term = FAMILIES[family].unit, FAMILIES[family].term
    seen = (first["step"], first[unit.name], last["step"], last[unit.name])
    assert seen == (2, 64 * unit.per_row, 3, 96 * unit.per_row)
    wanted = {"loss", term, "lr", "grad_norm", "p", "active", "aux_balance", "aux_dynamic", "layers"}
    assert wanted | {f"{unit.name}_per_s"} <= first.keys()
    assert {"active", "active_std", "theta", "p", "balance", "entropy"} <= first["layers"].keys()
    assert all(len(values) == 2 for values in first["layers"].values())
    assert [first["active_peak"], last["active_peak"]] == [max(peaks[:2]), peaks[2]]
    assert last["active_peak"] == pytest.approx(last["active"])
    assert "stop" not in first


@ONE_FAMILY
def test_dropped_experts_are_logged_as_means_and_warned_of_once_also_where_the_run_was_resumed(build, tmp_path, capsys):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = {"steps": 6, "log_every": 6, "checkpoint_every": 2, "micro_batch": 16, "capacity_factor": 1.0, "p0": 0.9}
    build(whole, **options).train()
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_00000006")
    build(resumed, **options).train()
    assert capsys.readouterr().err.count("experts per token have been dropped since the line before") == 2
    (line,) = log(whole)
    assert log(resumed) == [line] and line["dropped"] > 0 and len(line["layers"]["dropped"]) == 2
    lines = [{"step": 2, "active": 2.5, "dropped": 0.1}, {"step": 6, "active": 2.5, "dropped": 0.4}]
    assert active_experts(lines, MoEConfig(experts=4, target=2))["dropped"] == pytest.approx(0.3)


@ONE_FAMILY
def test_bf16_trains_close_to_fp32_with_fp32_weights(build, tmp_path):
    for precision in ("fp32", "bf16"):
        trainer = build(tmp_path / precision, steps=10, mixed_precision=precision)
        trainer.train()
        AcceleratorState._reset_state(reset_partial_state=True)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    fp32, bf16 = (log(tmp_path / precision)[-1]["loss"] for precision in ("fp32", "bf16"))
    assert bf16 != fp32
    assert bf16 == pytest.approx(fp32, rel=0.02)  # bf16 keeps 8 bits


@ONE_FAMILY
def test_one_process_that_shares_with_none_is_a_plain_run(build, unbroken, tmp_path):
    build(tmp_path, steps=10, parallel="fsdp2").train()
    assert bits(tmp_path, 10) == bits(unbroken, 10)


@ONE_FAMILY
def test_clipping_bounds_the_norm_of_the_update(build, tmp_path):
    trainer = build(tmp_path, steps=1, grad_clip=1e-3, log_every=1)
    norms = []
    step = trainer.training_step.optimizer.step

    def spy():
        grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        step()

    trainer.training_step.optimizer.step = spy
    trainer.train()
    assert norms == [pytest.approx(1e-3, rel=1e-3)]
    assert log(tmp_path)[0]["grad_norm"] > 1e-2


@ONE_FAMILY
def test_hooks_get_the_ema_model_in_evaluation_mode_without_gradients(build, tmp_path):
    calls = []

    def hook(step, model):
        calls.append((step, model.training, torch.is_grad_enabled(), any(p.requires_grad for p in model.parameters())))

    build(tmp_path, steps=5, hooks=[Hook(every=2, call=hook)]).train()
    assert calls == [(2, False, False, False), (4, False, False, False)]


@ONE_FAMILY
def test_the_routers_report_only_in_steps_that_are_logged(build, tmp_path, monkeypatch):
    asked = []

    def spy(model, reduce, report=True):
        asked.append(report)
        return update_routers(model, reduce, report=report)

    monkeypatch.setattr("dit_moe.training.step.update_routers", spy)
    build(tmp_path, steps=5, log_every=2).train()
    assert asked == [False, True, False, True, True]
    assert all("active" in line for line in log(tmp_path))


@ONE_FAMILY
def test_trackers_get_the_config_and_the_numbers_of_every_line(build, tmp_path, tracked):
    build(tmp_path, steps=4, log_every=2, trackers=("tensorboard",)).train()
    (first, config), (two, line), (four, _), (last, _) = tracked
    assert (first, two, four, last) == ("config", 2, 4, "finished")
    assert config["train/steps"] == 4
    assert line["train/loss"] == log(tmp_path)[0]["loss"]
    assert line["router/p/layer_01"] == log(tmp_path)[0]["layers"]["p"][1]
    assert all(isinstance(value, int | float) for value in line.values())


@pytest.mark.parametrize(
    ("shape", "processes", "dimension"),
    [((8, 64, 32), 4, 0), ((8, 64, 32), 16, 1), ((3, 5, 32), 4, 2), ((3, 5, 7), 4, None), ((3, 64), 4, None)],
)
def test_experts_are_cut_where_every_process_gets_as_much(shape, processes, dimension):
    cut = placement(shape, processes)
    assert (cut and cut.dim) == dimension
