"""Numbers that hooks return: one line per step in evaluations.jsonl, however often the run was stopped."""

import json
import os
import signal

import pytest

from dit_moe import checkpoint
from dit_moe.training import Hook, Interrupted
from tests.training.tiny_run import bits, log

pytestmark = pytest.mark.parametrize("family", ["DiT"], indirect=True)  # none of it depends on what is trained


def measured(run):
    path = run / "evaluations.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def hook(calls=None, every=5, **numbers):
    """Returns something of the weights, so that a line says which ones it is about."""

    def call(step, model):
        (calls if calls is not None else []).append(step)
        return {"fd": sum(weight.double().sum().item() for weight in model.parameters()), **numbers}

    return Hook(every=every, call=call, measures=True)


@pytest.fixture(scope="module")
def whole(build, tmp_path_factory):
    """20 steps, measured every 5."""
    run = tmp_path_factory.mktemp("whole")
    build(run, hooks=[hook()]).train()
    return run


def test_numbers_are_a_line_of_the_step_they_belong_to(whole):
    assert [line["step"] for line in measured(whole)] == [5, 10, 15, 20]
    assert len({line["fd"] for line in measured(whole)}) == 4


def test_measuring_changes_nothing_of_the_training(unbroken, whole):
    assert bits(unbroken, 20) == bits(whole, 20) and log(unbroken) == log(whole)


def test_none_is_no_line_and_leaves_no_file(build, tmp_path):
    calls = []
    build(tmp_path, steps=4, hooks=[Hook(every=2, call=lambda step, model: calls.append(step))]).train()
    assert calls == [2, 4] and not (tmp_path / "evaluations.jsonl").exists()


def test_hooks_of_one_step_share_its_line(build, tmp_path):
    build(tmp_path, steps=6, hooks=[Hook(every=2, call=lambda *_: {"a": 1}), hook(every=3, b=[2, 3])]).train()
    names = [set(line) - {"step"} for line in measured(tmp_path)]
    assert names == [{"a"}, {"fd", "b"}, {"a"}, {"a", "fd", "b"}]


def test_hooks_and_checkpoints_count_in_the_time_left(build, tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr("dit_moe.progress.TrainingBar.beside", lambda bar, *work: counted.append(work[:2]))
    build(tmp_path, steps=6, checkpoint_every=4, hooks=[hook(every=2), hook(every=6)]).train()
    samples, checkpoints = [("hook 0", 2)], [("checkpoint", 4)]
    assert counted == [*samples, *checkpoints, *samples, *checkpoints, *samples, ("hook 1", 6)]


class Killed(BaseException):
    """Nothing catches it."""


@pytest.mark.parametrize("step, place", [(9, 0), (10, 0), (10, 1), (20, 1)])  # in the list of hooks
def test_a_run_that_dies_anywhere_and_goes_on_has_every_line_once(build, tmp_path, whole, step, place):
    def die(now, model):
        if now == step:
            raise Killed

    hooks = [hook()]
    hooks.insert(place, Hook(every=1, call=die))
    with pytest.raises(Killed):
        build(tmp_path, hooks=hooks).train()
    build(tmp_path, hooks=[hook()]).train()
    assert measured(tmp_path) == measured(whole)
    assert bits(tmp_path, 20) == bits(whole, 20)


@pytest.mark.parametrize("part", ["model.safetensors", "state.json"])
def test_a_run_that_dies_while_it_saves_has_every_line_once(build, tmp_path, whole, part, monkeypatch):
    saved = []

    def die(path, original=checkpoint.sync):
        saved.extend([path] if path.name == part else [])
        if len(saved) == 2:
            raise Killed
        original(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sync", die)
        with pytest.raises(Killed):
            build(tmp_path, hooks=[hook()]).train()
    assert [line["step"] for line in measured(tmp_path)] == [5, 10, 15]
    build(tmp_path, hooks=[hook()]).train()
    assert measured(tmp_path) == measured(whole)


def test_a_run_that_was_asked_to_stop_measures_that_step_when_it_goes_on(build, tmp_path, whole):
    def stop(step, model):
        os.kill(os.getpid(), signal.SIGTERM) if step == 9 else None

    calls = []
    with pytest.raises(Interrupted, match="saved at step 10"):
        build(tmp_path, hooks=[Hook(every=1, call=stop), hook(calls)]).train()
    assert calls == [5]
    build(tmp_path, hooks=[hook(calls)]).train()
    assert calls == [5, 10, 15, 20]
    assert measured(tmp_path) == measured(whole)


def test_hooks_that_measure_nothing_are_not_called_again(build, tmp_path):
    build(tmp_path, steps=10).train()
    calls = []
    build(tmp_path, steps=15, hooks=[Hook(every=5, call=lambda step, model: calls.append(step))]).train()
    assert calls == [15]


def test_a_checkpoint_older_than_the_log_cuts_it(build, tmp_path, whole):
    build(tmp_path, steps=10, hooks=[hook()]).train()
    before = (tmp_path / "evaluations.jsonl").read_text()
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 15, "fd": -1}\n{"step": 20, "f')
    calls = []
    build(tmp_path, steps=10, hooks=[hook(calls)]).train()
    assert (tmp_path / "evaluations.jsonl").read_text() == before and calls == []
    build(tmp_path, hooks=[hook()]).train()
    assert measured(tmp_path) == measured(whole)


def test_trackers_and_the_screen_get_the_numbers_apart_from_those_of_training(build, tmp_path, tracked, capsys):
    call = Hook(every=2, call=lambda *_: {"fd_digits_cnn64": 12.34567, "loss": {"heldout": 0.5}}, measures=True)
    build(tmp_path, steps=2, log_every=2, trackers=("tensorboard",), hooks=[call]).train()
    _, (_, training), (step, numbers), _ = tracked
    assert (step, numbers) == (2, {"eval/fd_digits_cnn64": 12.34567, "eval/loss/heldout": 0.5})
    assert training["train/loss"] == log(tmp_path)[0]["loss"]
    assert "step 2/2  fd_digits_cnn64 12.35  loss/heldout 0.5\n" in capsys.readouterr().err
    assert checkpoint.open_checkpoint(tmp_path).step == 2
