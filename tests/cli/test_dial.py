"""`dit-moe dial` measures one checkpoint at several targets, goes on where it stopped, and refuses what cannot be."""

import json
import re
import shutil
from functools import cache, partial

import pytest

from dit_moe.evaluation.heldout_loss import HeldoutConfig
from dit_moe.moe import routers_of
from dit_moe.studies import compute_budget_runs
from dit_moe.studies.compute_budget_runs import ImageOptions, ImageRunAtBudgets, TextRunAtBudgets
from dit_moe.tasks import images
from tests.cli.conftest import CONFIG, SMALL, cli


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(compute_budget_runs, "HeldoutConfig", partial(HeldoutConfig, draws=1, images=40))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Call it with changes to the small run for its folder; each is trained once."""
    root = tmp_path_factory.mktemp("runs")

    @cache
    def train(*changes):
        folder = root / str(len(list(root.iterdir())))
        assert cli("train", CONFIG, "--run", folder, *SMALL, *changes) == 0
        return folder

    return train


@pytest.fixture
def topk_run(trained):
    return trained("model.moe.router=topk")


def result(folder):
    return json.loads((folder / "dial.json").read_text())["runs"]


def points_of(folder, measure="loss"):
    """Targets and points by entry, in the order in which they were measured."""
    return [[point["target"] for point in entry["points"]] for entry in result(folder) if entry["measure"] == measure]


@pytest.fixture
def measured(monkeypatch):
    """What is measured, as it happens."""
    found, measure = [], ImageRunAtBudgets.measure

    def noted(self, target, names):
        found.append((target, *names))
        return measure(self, target, names)

    monkeypatch.setattr(ImageRunAtBudgets, "measure", noted)
    return found


def test_compute_grows_with_the_target_and_is_what_was_asked_for(finished_run, topk_run, tmp_path, capsys):
    before = {path: path.read_bytes() for path in finished_run.rglob("*.safetensors")}
    words = ("--targets", "1,2,4", "count=100", "--seeds", "2", "--out", tmp_path)  # 200 images: a mean within 3 %

    assert cli("dial", finished_run, topk_run, *words) == 0
    entries = result(tmp_path)
    assert [(entry["router"], entry["measure"]) for entry in entries] == [
        *(("dtopp", measure) for measure in ("loss", "distance")),
        *(("topk", measure) for measure in ("loss", "distance")),
    ]
    for entry in entries:
        trained, *points = entry["points"]
        wanted = [1, 2, 4] if entry["router"] == "dtopp" else [1, 4]  # k = 2 is as trained
        assert trained["target"] is None and [point["target"] for point in points] == wanted
        flops = [point["flops"] for point in points]
        assert flops == sorted(set(flops))
        assert points[0]["device"] == "cpu" and "torch" in points[0]["versions"]
        if entry["measure"] == "distance":
            for point in points:
                assert point["active"] == pytest.approx(point["target"], rel=0.03)
                assert point["std"] > 0 and point["value"] > point["floor"] > 0
    trained, one, two, four = entries[0]["points"]
    assert trained["thresholds"] != two["thresholds"] and one["thresholds"][0] < two["thresholds"][0]
    assert len({point["value"] for point in (one, two, four)}) == 3
    assert all(path.read_bytes() == content for path, content in before.items())
    table = capsys.readouterr().out
    assert table == (tmp_path / "dial.md").read_text() and table.count("\n") == 2 + 4 + 3
    for label in ("DTop-p", "top-k"):
        assert re.search(rf"\| {label} +\| \*\*as trained\*\*", table)
    assert (tmp_path / "dial.png").read_bytes()[:4] == b"\x89PNG"


def test_samples_of_sharp_routers_are_made_with_the_solved_thresholds_and_not_with_all_experts(finished_run):
    words = (["count=20"], None, ImageOptions(seeds=1, draws=1, images=20))
    run = ImageRunAtBudgets(finished_run, *words)
    for router in routers_of(run.run.model):
        router.theta.data *= 60  # what is left behind the first expert is below 1e-14
    measured = run.measure(1.7, ["distance"])["distance"]
    assert measured["thresholds"] == [1.0, 1.0] and measured["active"] == pytest.approx(1.7, rel=0.1)


def test_points_that_are_there_are_kept_and_other_settings_measure_anew(a_run, monkeypatch, measured):
    measure = ImageRunAtBudgets.measure

    def interrupted(self, target, names):
        if target == 3:
            raise KeyboardInterrupt
        return measure(self, target, names)

    words, out = ("dial", a_run, "--targets", "1,3", "--no-metric"), a_run / "dial"
    with monkeypatch.context() as patch:
        patch.setattr(ImageRunAtBudgets, "measure", interrupted)
        assert cli(*words) == 130
    assert points_of(out) == [[None, 1]]
    measured.clear()
    assert cli(*words) == 0
    assert measured == [(3, "loss")]
    first = result(out)
    assert cli("dial", a_run, "--targets", "3", "--no-metric", "batch_size=7") == 0
    assert result(out) == first  # what was not asked for stays
    assert "| 1 |" not in (out / "dial.md").read_text()  # and is not shown
    measured.clear()
    assert cli("dial", a_run, "--targets", "3", "--no-metric", "sampler.steps=3") == 0
    assert measured == [(None, "loss"), (3, "loss")]
    assert points_of(out) == [[None, 1, 3], [None, 3]]  # beside each other
    shutil.rmtree(a_run / "checkpoints" / "step_00000004")
    assert cli("dial", a_run, "--targets", "3", "--no-metric", "sampler.steps=3") == 0
    assert points_of(out) == [[None, 1, 3], [None, 3], [None, 3]]


def test_each_measure_keeps_its_points_by_its_own_settings_and_those_of_other_runs_stay(
    finished_run, topk_run, tmp_path, measured
):
    words = ("--targets", "1", "count=20", "--out", tmp_path)
    assert cli("dial", finished_run, *words, "--seeds", "1") == 0
    assert cli("dial", topk_run, f"{topk_run}/", *words, "--no-metric") == 0  # named twice, it is one
    assert (tmp_path / "dial.md").read_text().count("\n") == 2 + 2
    assert cli("dial", finished_run, *words, "--no-metric") == 0  # throws no distance away
    assert cli("dial", finished_run, *words, "--seeds", "1") == 0
    assert measured == [(None, "loss", "distance"), (1, "loss", "distance"), (None, "loss"), (1, "loss")]
    assert cli("dial", finished_run, *words, "--seeds", "2") == 0
    assert cli("dial", finished_run, *words, "--seeds", "1", "--images", "30", "--draws", "2") == 0
    assert measured[4:] == [(None, "distance"), (1, "distance"), (None, "loss"), (1, "loss")]
    assert sorted(entry["router"] for entry in result(tmp_path)) == ["dtopp"] * 4 + ["topk"]
    assert points_of(tmp_path, "distance") == [[None, 1]] * 2 and points_of(tmp_path) == [[None, 1]] * 3


def test_points_on_other_held_out_images_are_of_another_curve(finished_run, tmp_path, monkeypatch):
    words = ("--no-metric", "--out", tmp_path, "--targets")
    assert cli("dial", finished_run, *words, "1") == 0
    monkeypatch.setattr("dit_moe.data.digits.Digits.fingerprint", "of other images")
    assert cli("dial", finished_run, *words, "1,3") == 0
    assert points_of(tmp_path) == [[None, 1], [None, 1, 3]]


def test_of_text_other_windows_are_another_curve_and_what_is_for_images_is_refused(finished_text, tmp_path, capsys):
    run = finished_text / "run"
    found = [TextRunAtBudgets(run, changes, None).identities for changes in ([], ["data.length=16"])]
    assert found[0] != found[1]
    assert cli("dial", run, "--extractor", "inception", "--out", tmp_path / "out") == 2
    assert "--extractor is for models of images" in capsys.readouterr().err


def test_default_targets_of_a_fixed_threshold_are_around_the_mean_that_it_has(trained, tmp_path):
    topp_run = trained("model.moe.router={name: topp, p: 0.8}")
    assert cli("dial", topp_run, "--no-metric", "--out", tmp_path) == 0
    ((first, *targets),) = points_of(tmp_path)
    active = result(tmp_path)[0]["points"][0]["active"]
    assert first is None and active > 2.5
    assert targets[0] == pytest.approx(active / 2, abs=1e-4) and targets[-1] == 4
    assert round(active, 4) in targets


def test_a_run_without_held_out_images_is_measured_on_the_others_and_that_is_said(
    finished_run, tmp_path, monkeypatch, capsys
):
    opened, label = images.open_split, "train (nothing was held out)"
    monkeypatch.setattr(images, "open_split", lambda run, split: (opened(run, "train")[0], label))
    assert cli("dial", finished_run, "--targets", "1", "--no-metric", "--out", tmp_path) == 0
    assert f"the loss is of the images in {label}" in capsys.readouterr().err
    assert result(tmp_path)[0]["identity"]["split"] == label


def test_a_dense_run_is_refused_and_a_damaged_result_not_written_over(trained, finished_run, tmp_path, capsys):
    assert cli("dial", trained("model={name: DiT-custom/4}", "model.moe=null")) == 2
    assert "model is dense; its compute cannot be changed" in capsys.readouterr().err
    (tmp_path / "dial.json").write_text("{")
    assert cli("dial", finished_run, "--no-metric", "--out", tmp_path) == 2
    assert "dial.json is truncated, or still being written; move it away" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--targets", "1,x"], "--targets 1,x must be numbers with commas between them"),
        (["--targets", "9"], "target=9 is outside what the router allows, 1 to 4"),
        (["target=3"], "target is what the command itself changes; name the values with --targets"),
        (["sample.vary=time"], "vary is what the command itself changes"),
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--draws", "0"], "--draws 0 must be at least 1"),
        (["count=1"], "has 1 image; an evaluation needs at least 2"),
        (["--extractor", "cifar10_cnn"], "takes images of 3 channels, not 1"),
        (["--seeds", "2", "--no-metric"], "--seeds is for samples, which --no-metric leaves out"),
        (["sampler.stepz=3"], "sample.sampler.stepz is not a known key"),
    ],
)
def test_bad_words_are_refused_before_anything_is_measured(finished_run, tmp_path, words, message, capsys, measured):
    assert cli("dial", finished_run, "--out", tmp_path / "out", *words) == 2 and not measured
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
