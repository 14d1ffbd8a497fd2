"""A run is one run in its trackers, however often it was stopped, and none of them can end it."""

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import LoggerType

from dit_moe.config import ConfigError
from dit_moe.training import Hook, TrainingError
from dit_moe.training.trackers import Trackers
from tests.training.conftest import FakeTracker

pytestmark = pytest.mark.parametrize("family", ["DiT"], indirect=True)  # none of it depends on what is trained


@pytest.fixture
def fake(tracked, monkeypatch):
    """The tracker that stands in for all three, as long as nobody else's package is there."""
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.setattr("accelerate.tracking._available_trackers", list(LoggerType))
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, type(name, (FakeTracker,), {"name": name}))
    return FakeTracker


@pytest.fixture
def start(build, fake, tmp_path):
    """Starts trackers by name after a step; returns the options that they get."""
    accelerator = build(tmp_path).accelerator

    def start(step, *names):
        fake.options.clear()
        Trackers(accelerator, tmp_path, names).start({}, step)
        return dict(zip(sorted(dict.fromkeys(names), key="tensorboard".__eq__), fake.options, strict=True))

    return start


def test_a_run_that_goes_on_is_the_same_run_in_each_and_one_that_begins_anew_is_a_new_one(start, tmp_path, monkeypatch):
    every = ("tensorboard", "wandb", "trackio")
    first, on, anew = (start(step, *every) for step in (0, 10, 0))
    assert [each["tensorboard"]["purge_step"] for each in (first, on, anew)] == [1, 11, 1]
    assert on["wandb"] == first["wandb"] != anew["wandb"]
    assert on["wandb"]["resume"] == "allow"
    assert [each["trackio"]["resume"] for each in (first, on, anew)] == ["never", "allow", "never"]
    assert start(20, "wandb")["wandb"] == anew["wandb"], "it is that of the newest start"
    assert (start(0, "wandb"), start(10, "wandb"))[1]["wandb"]["resume"] == "allow", "also without the others"
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert start(20, "wandb")["wandb"]["id"] == "mine"
    assert start(20, "wandb", "wandb").keys() == {"wandb"}


@pytest.mark.parametrize("content", ["[", '{"wandb": 5}', '{"wandb": "a b"}'])
def test_a_damaged_record_of_the_id_is_refused_and_not_a_new_run(start, tmp_path, content):
    (tmp_path / "trackers.json").write_text(content)
    with pytest.raises(ValueError, match=r"trackers\.json.*; delete it, and the run begins anew in its trackers"):
        start(10, "wandb")


def test_a_tracker_that_cannot_be_started_is_one_sentence_before_anything_is_written(
    build, fake, tmp_path, monkeypatch
):
    def refuse(self):
        raise RuntimeError("No API key configured.\n  Use `wandb login` to log in.")

    monkeypatch.setattr(LOGGER_TYPE_TO_CLASS["wandb"], "start", refuse)
    trainer = build(tmp_path / "run", steps=2, trackers=("tensorboard", "wandb"))
    with pytest.raises(ConfigError) as caught:
        trainer.train()
    assert str(caught.value) == (
        "train.trackers=wandb cannot be started (No API key configured. Use `wandb login` to log in.); "
        "run `wandb login`, set WANDB_MODE=offline, or leave it out of train.trackers"
    )
    assert trainer.prefetcher.dataset.asked == []
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_fails_in_the_middle_costs_a_warning_and_not_the_run(build, fake, tmp_path, monkeypatch, capsys):
    def fail(self, values, step):
        raise ConnectionError("the network is gone")

    monkeypatch.setattr(LOGGER_TYPE_TO_CLASS["wandb"], "log", fail)
    build(tmp_path, steps=2, log_every=1, p0=0.7, trackers=("wandb", "tensorboard")).train()
    warning = "warning: wandb failed at step 1 (ConnectionError: the network is gone) and gets no more; log.jsonl has"
    assert capsys.readouterr().err.count(warning) == 1
    assert [step for step, _ in fake.calls if isinstance(step, int)] == [1, 2], "the other one gets all"


def test_tensorboard_has_one_run_and_hides_what_was_logged_after_the_checkpoint(build, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_multiplexer")
    settings = {"log_every": 1, "p0": 0.7, "trackers": ("tensorboard",)}

    def stop(step, model):
        raise ValueError("enough")

    with pytest.raises(TrainingError):
        build(tmp_path, checkpoint_every=2, steps=9, hooks=[Hook(every=3, call=stop)], **settings).train()
    build(tmp_path, steps=4, **settings).train()
    read = events.EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    assert read.Runs().keys() == read.PluginRunToTagToContent("hparams").keys() == {"dit_moe"}
    assert [event.step for event in read.Scalars("dit_moe", "loss")] == [1, 2, 3, 4]
