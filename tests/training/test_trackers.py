"""A run is one run in its trackers, however often it was stopped, and none of them can end it."""

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import LoggerType
from PIL import Image

from dit_moe.config import ConfigError
from dit_moe.pictures import save_png
from dit_moe.training import Hook, TrainConfig, TrainingError
from dit_moe.training.curves_of_runs import CurvesPicture
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

    def start(step, *names, **config):
        fake.options.clear()
        Trackers(accelerator, tmp_path, TrainConfig(trackers=names, **config)).start({}, step)
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
    named = start(0, *every, run_name="first", run_group="tries")
    assert all(named[each].items() >= {"name": "first", "group": "tries"}.items() for each in ("wandb", "trackio"))


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


@pytest.fixture
def stopped_and_resumed(build, tmp_path):
    """Trains with a tracker up to step 4, stopped in between, with grids of samples and curves."""

    def save_grid(step, model):
        (tmp_path / "grid.png").unlink(missing_ok=True)
        save_png(Image.new("RGB", (8, 6), (step, 0, 0)), tmp_path / "grid.png")
        return {"samples": tmp_path / "grid.png", "fd": 1.5}

    def stop(step, model):
        raise ValueError("enough")

    def train(name):
        grids = Hook(every=2, call=save_grid)
        settings = {"log_every": 1, "p0": 0.7, "checkpoint_every": 2, "trackers": (name,), "run_name": "mine"}
        with pytest.raises(TrainingError):
            build(tmp_path, steps=9, hooks=[grids, Hook(every=3, call=stop)], **settings).train()
        build(tmp_path, steps=4, hooks=[grids], curves=CurvesPicture(tmp_path), **settings).train()
        return tmp_path

    return train


SCALARS = {"train/loss", "train/lr", "train/grad_norm", "train/images_per_second", "router/p", "router/active/layer_01"}


def test_tensorboard_has_one_run_and_hides_what_was_logged_after_the_checkpoint(stopped_and_resumed):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_multiplexer")
    folder = stopped_and_resumed("tensorboard")
    read = events.EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    assert read.Runs().keys() == read.PluginRunToTagToContent("hparams").keys() == {"tensorboard"}
    assert [event.step for event in read.Scalars("tensorboard", "train/loss")] == [1, 2, 3, 4]
    tags = read.Runs()["tensorboard"]["scalars"]
    assert {*SCALARS, "eval/fd"} <= set(tags) and all("/" in tag for tag in tags)
    grids, curves = (read.Images("tensorboard", name) for name in ("samples", "curves"))
    assert [(each.step, each.width, each.height) for each in grids] == [(2, 8, 6), (4, 8, 6)]
    assert [each.step for each in curves] == [4] and curves[0].width > 400


def records(file):
    """Those of a file of wandb's: after 7 bytes, LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(whole)
            whole = b""


def test_wandb_has_one_run_that_goes_on_with_pictures_and_named_numbers(stopped_and_resumed, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    folder = stopped_and_resumed("wandb")
    wandb.teardown()  # waits for wandb's own process, which may write the end of a file after finish() has returned
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1, "an offline start each, of one run"
    found = [record for file in files for record in records(file)]
    assert {record.run.display_name for record in found if record.HasField("run")} == {"mine"}
    names = {item.key or item.nested_key[0] for record in found for item in record.history.item}
    names = {name for name in names if not name.startswith("_")}
    assert {*SCALARS, "eval/fd", "samples", "curves"} <= names
    assert all("/" in name for name in names - {"samples", "curves"})
    pictures = [path.name.split("_")[0] for path in folder.glob("wandb/offline-run-*/files/media/images/*.png")]
    assert sorted(pictures) == ["curves", "samples", "samples"]
