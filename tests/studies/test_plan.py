"""What is there of a study's runs, and that runs of two studies are never mixed."""

import fcntl
import json
import shutil
import threading
from dataclasses import asdict, replace

import numpy as np
import pytest

from dit_moe import checkpoint
from dit_moe.config import ConfigError
from dit_moe.evaluation.heldout_loss import HeldoutConfig
from dit_moe.studies import score
from dit_moe.studies.plan import plan
from dit_moe.studies.results import gather
from dit_moe.studies.score import SCORE, check_config, check_scoring, metric_identity, provenance, read_loss, read_score
from dit_moe.studies.study import load_study
from dit_moe.studies.train_and_score import train_and_score, wait_for
from dit_moe.tasks.train import build_trainer, prepare
from tests.studies.examples import write_small_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return load_study(write_small_study(tmp_path_factory.mktemp("study")))


@pytest.fixture(scope="module")
def runs(study, tmp_path_factory):
    planned = plan(study, tmp_path_factory.mktemp("none"), tmp_path_factory.mktemp("out"))
    train_and_score(study, planned[1])
    return planned


def test_a_run_is_trained_and_scored_once(study, runs):
    assert read_score(study, runs[0]) is None
    score = read_score(study, runs[1])
    assert score["step"] == 4 and score["loss"] == score["terms"]["loss"] > 0
    assert score["active"] == pytest.approx(sum(score["active_layers"]) / 2)
    assert score["metric"]["name"] == study.metric and score["metric"]["better"] == "lower"
    assert score["made"] == provenance("fp32")
    before = [(path, path.stat().st_mtime_ns) for path in sorted(runs[1].folder.rglob("*"))]
    train_and_score(study, runs[1])
    assert [(path, path.stat().st_mtime_ns) for path in sorted(runs[1].folder.rglob("*"))] == before


def test_another_way_of_scoring_makes_the_score_anew_and_trains_nothing(study, runs):
    other = replace(study, heldout=HeldoutConfig(draws=2), metric=None)
    assert read_score(other, runs[1]) is None
    weights = runs[1].weights_sha256()
    path = runs[1].folder / SCORE
    before = path.read_text()
    train_and_score(other, runs[1])
    score = read_score(other, runs[1])
    assert score["metric"] is None and score["loss"] != json.loads(before)["loss"]
    assert runs[1].weights_sha256() == weights
    path.write_text(before)


def test_other_held_out_data_another_version_and_a_damaged_file_are_another_score(study, runs, monkeypatch):
    path = runs[1].folder / SCORE
    whole = path.read_text()
    assert read_score(study, runs[1]) is not None
    assert read_score(study, replace(runs[1], heldout="others")) is None
    path.write_text(whole[: len(whole) // 2])
    assert read_score(study, runs[1]) is None
    for negative in ({"metric": json.loads(whole)["metric"] | {"value": -1.0}}, {"active": -1.0}, {"made": []}):
        path.write_text(json.dumps(json.loads(whole) | negative))
        assert read_score(study, runs[1]) is None
    path.write_text(whole)
    monkeypatch.setattr("dit_moe.studies.score.version", lambda name: "0.0")
    assert read_score(study, runs[1]) is None


def test_a_metric_is_of_the_images_that_its_reference_held_and_is_reported_without_them(study, runs, tmp_path):
    file, out = tmp_path / "reference.npz", runs[1].folder.parent.parent
    compared = replace(study, changes=(*study.changes, f"eval.reference={file}", "eval.images=8"))

    def score_of(seed):
        if seed is not None:
            np.savez(file, np.random.default_rng(seed).integers(0, 256, (10, 8, 8, 1), dtype=np.uint8))
        return read_score(compared, plan(compared, tmp_path, out)[1])

    path = runs[1].folder / SCORE
    before = path.read_text()
    assert score_of(seed=0) is None
    identity = metric_identity(compared, plan(compared, tmp_path, out)[1])
    whole = json.loads(before)
    path.write_text(json.dumps(whole | {"metric": whole["metric"] | {"identity": identity}}))
    assert score_of(seed=0) is not None and score_of(seed=1) is None
    file.unlink()
    assert score_of(seed=None) is not None
    path.write_text(before)


def test_a_metric_that_is_left_out_and_taken_in_again_measures_nothing_anew(study, runs):
    before = (runs[1].folder / SCORE).read_text()
    without = replace(study, metric=None)
    train_and_score(without, runs[1])
    assert (runs[1].folder / SCORE).read_text() == before and read_score(without, runs[1])["metric"] is None
    assert read_score(study, runs[1])["metric"] == json.loads(before)["metric"]


def test_a_metric_that_fails_leaves_the_loss_which_is_not_measured_again(study, runs, monkeypatch):
    path = runs[1].folder / SCORE
    before = path.read_text()

    def fail(*_):
        raise ValueError("no metric today")

    path.unlink()
    with monkeypatch.context() as broken:
        broken.setattr(score, "_metric_of_images", fail)
        with pytest.raises(ValueError, match="no metric today"):
            train_and_score(study, runs[1])
    assert read_score(study, runs[1]) is None
    assert read_loss(study, runs[1])["loss"] == json.loads(before)["loss"]
    monkeypatch.setattr("dit_moe.studies.train_and_score.score_loss", fail)
    train_and_score(study, runs[1])
    assert json.loads(path.read_text()) == json.loads(before) | {"memory": None}  # of a training in another process


@pytest.mark.parametrize(
    ("change", "said"), [("train.lr=0.5", "train.lr=0.5"), ("model.width=64", "model.mlp_hidden=256")]
)
def test_a_run_of_another_config_is_refused_by_key_and_both_values(study, runs, change, said, tmp_path):
    with pytest.raises(ConfigError, match=f"{said} in the study, but the run in .* was trained with .*--out"):
        plan(replace(study, changes=(*study.changes, change)), tmp_path, runs[1].folder.parent.parent)


def test_a_run_of_an_earlier_version_which_had_fewer_options_is_the_same_run(study, runs, tmp_path, monkeypatch):
    whole = checkpoint.Checkpoint.config

    def without_todays_options(saved):
        config = whole(saved)
        for option in ("score", "input", "gate_scale"):
            del config["model"]["moe"]["router"][option]
        return config

    monkeypatch.setattr(checkpoint.Checkpoint, "config", without_todays_options)
    plan(study, tmp_path, runs[1].folder.parent.parent)
    experiment, dataset = prepare(runs[1].experiment)
    assert build_trainer(experiment, dataset, runs[1].folder).open_run() == 4
    other = replace(runs[1].experiment, model=change_router(runs[1].experiment.model, gate_scale=2.0))
    with pytest.raises(
        ConfigError, match=r"^model.moe.router.gate_scale=2.0 differs from the run in .*, which has 1.0"
    ):
        build_trainer(other, dataset, runs[1].folder).open_run()


def change_router(model, **options):
    return replace(model, moe=replace(model.moe, router=replace(model.moe.router, **options)))


def test_a_run_whose_learning_rate_was_changed_and_changed_back_is_refused(study, runs, tmp_path):
    folder = tmp_path / "out" / runs[1].folder.relative_to(runs[1].folder.parent.parent)
    shutil.copytree(runs[1].folder, folder)
    state = checkpoint.latest(folder) / "state.json"
    changes = [{"step": 1, "train.lr": [0.001, 0.5]}, {"step": 3, "train.lr": [0.5, 0.001]}]
    state.write_text(json.dumps(json.loads(state.read_text()) | {"changes": changes}))
    with pytest.raises(ConfigError, match=r"^train.lr was changed after step 1 of the run in .*--out"):
        plan(study, tmp_path / "none", tmp_path / "out")


@pytest.mark.parametrize("change", ["train.workers=2", "train.checkpoint_every=3", "sample.count=5"])
def test_what_has_no_part_in_the_weights_may_change(study, runs, change, tmp_path):
    assert plan(replace(study, changes=(*study.changes, change)), tmp_path, runs[1].folder.parent.parent)


def test_results_hold_what_is_there_and_name_what_is_missing(study, runs):
    results = gather(study, "small", runs, None)
    json.dumps(asdict(results), allow_nan=False)
    topk, dtopp = results.variants
    assert results.missing == [("topk", 0)] and not results.finished
    assert topk.runs == [] and [run.seed for run in dtopp.runs] == [0]
    assert dtopp.controlled and not topk.controlled and dtopp.baseline == "topk"
    (run,) = dtopp.runs
    assert run.curves["step"] == [1, 2, 3, 4] and len(run.curves["p"]) == 4
    assert run.flops == pytest.approx(runs[1].experiment.model.footprint().forward_flops, rel=0.3)


def test_a_metric_that_the_report_will_not_have_is_named_before_the_training_beside_those_that_it_has(study, runs):
    for wrong in ("fid.generated", "fd_digits_cnn64.ration", "fd_digits_cnn64"):
        with pytest.raises(ConfigError, match=rf"metric={wrong} is no number .*fd_digits_cnn64.ratio"):
            check_config(replace(study, metric=wrong), runs[0].experiment)


def test_a_folder_that_a_killed_study_left_in_use_is_waited_for(tmp_path):
    with (tmp_path / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Timer(0.5, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        wait_for(tmp_path)
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is in use by another process"):
            wait_for(tmp_path, seconds=1)


def test_data_without_held_out_images_are_refused_before_the_training(study, tmp_path):
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "images" / name / "0.png")
    data = [f"data={{name: image_folder, path: {tmp_path / 'images'}, size: 8}}"]
    changes = (*study.changes, *data, "eval.extractor=digits_cnn64")
    (run, _) = plan(replace(study, changes=changes), tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"variant topk cannot be scored on held-out data: .*heldout"):
        check_scoring(study, run)
