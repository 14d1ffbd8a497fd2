"""`dit-moe compare`: a whole small study, interrupted and not."""

import json
import os
import shlex
import shutil
import signal
import time

import pytest

from dit_moe.studies import compare, score
from dit_moe.studies.plan import plan
from dit_moe.studies.study import load_study
from dit_moe.training.step import NotFinite
from tests.scripts import in_use
from tests.studies.examples import run_here, write_small_study

from .conftest import cli

FIGURES = ("loss_vs_flops", "active_over_training", "p_over_training", "active_by_layer", "quality_vs_active")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_small_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "compare-small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "run_jobs", run_here)
        assert cli("compare", study, "--out", out) == 0
    return out


@pytest.fixture
def copy(finished, tmp_path):
    """Of the finished study, which a test may change."""
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(compare, "save_figures", lambda results, folder: None)


def weights(out):
    """Those at the end: a run that was stopped has saved itself in between, too."""
    files = sorted(out.glob("*/seed-*/checkpoints/step_00000004/*.safetensors"))
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def results_of(out):
    return json.loads((out / "results.json").read_text())


def scores_of(out):
    """The results without the run folders' names, and the memory of the processes that trained them."""
    return [
        [{key: value for key, value in run.items() if key not in ("folder", "memory")} for run in variant["runs"]]
        for variant in results_of(out)["variants"]
    ]


def test_it_leaves_results_a_table_and_figures(finished):
    results = results_of(finished)
    assert results["finished"] and not results["missing"] and results["study"] == "small"
    assert [variant["name"] for variant in results["variants"]] == ["topk", "dtopp"]
    for variant in results["variants"]:
        (run,) = variant["runs"]
        assert run["step"] == 4 and run["loss"] > 0 and run["metric"] > 0
        assert variant["seconds_per_step"] > 0
        assert 1 <= run["active"] <= 4 and run["flops"] > 0
    assert results["variants"][0]["runs"][0]["active"] == 2
    assert "top-k" in (finished / "table.md").read_text() and "DTop-p" in (finished / "table.csv").read_text()
    for name in FIGURES:
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name


def test_a_second_call_trains_scores_and_times_nothing_and_gives_the_same_results(finished, study, no_figures, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    runs = [path for path in finished.glob("*/seed-0/*") if path.is_file()]
    times = [path.stat().st_mtime_ns for path in runs]
    assert cli("compare", study, "--out", finished) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert [path.stat().st_mtime_ns for path in runs] == times
    assert capsys.readouterr().out == (finished / "table.md").read_text()


def test_killed_at_any_time_it_goes_on_to_the_same_results(finished, study, copy, no_figures):
    """kill -9 to the command itself while one run of two is under way; the run, which nobody told, ends with it.

    That run is a process of its own, those of the finished study were none.
    """
    shutil.rmtree(copy / "dtopp")
    (copy / "results.json").unlink()
    child = os.fork()
    if child == 0:
        os._exit(cli("compare", study, "--out", copy))
    deadline = time.monotonic() + 240
    while not list(copy.glob("dtopp/seed-0/checkpoints/step_*")):
        assert not os.waitpid(child, os.WNOHANG)[0] and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not (copy / "results.json").exists()
    assert cli("compare", study, "--out", copy) == 0  # a run still saving itself is waited for
    assert weights(copy) == weights(finished)
    assert scores_of(copy) == scores_of(finished)


def test_times_of_other_runs_are_not_read_and_times_made_elsewhere_are_told_apart(finished, study, tmp_path):
    runs = plan(load_study(study), study.parent, finished)
    timing = score.read_timing(finished, runs, 1)
    assert score.was_measured_here(timing, runs)
    for key, value in (("threads", 99), ("versions", {"torch": "0.1"}), ("machine", {"cpu": "abacus"})):
        assert not score.was_measured_here({**timing, "made": timing["made"] | {key: value}}, runs), key
    assert score.read_timing(finished, runs, 2) is None
    changed = plan(load_study(study, ["train.micro_batch=4"]), study.parent, finished)
    assert score.read_timing(finished, changed, 1) is None
    for damaged in ({"seconds_per_step": {"topk": [0.1]}}, {"seconds_per_step": []}, {"made": [1]}, {"runs": [1]}):
        (tmp_path / "timing.json").write_text(json.dumps(timing | damaged))
        assert score.read_timing(tmp_path, runs, 1) is None


def test_times_made_elsewhere_are_reported_as_they_are_and_measured_anew_by_a_call_that_runs(
    study, copy, no_figures, monkeypatch
):
    path, asked = copy / "timing.json", []
    timing = json.loads(path.read_text())
    timing["made"]["threads"] = 99
    path.write_text(json.dumps(timing))
    monkeypatch.setattr(score, "seconds_per_step", lambda runs, steps: asked.append(steps) or {"topk": 1.0})
    assert cli("compare", study, "--out", copy, "--report") == 0
    assert not asked and results_of(copy)["timing"]["made"]["threads"] == 99
    assert cli("compare", study, "--out", copy) == 0
    assert asked == [1] and results_of(copy)["timing"]["made"]["threads"] != 99


def test_variants_are_timed_over_all_their_micro_batches(finished, study):
    runs = plan(load_study(study, ["train.micro_batch=3"]), study.parent, finished)
    assert score.seconds_per_step(runs[:1], 1)["topk"] > 0


@pytest.mark.parametrize(
    "error",
    [RuntimeError("DefaultCPUAllocator: can't allocate memory"), NotFinite({"loss": float("nan")})],
    ids=["memory", "nan"],
)
def test_where_a_step_cannot_be_timed_the_rest_is_there(study, copy, no_figures, monkeypatch, capsys, error):
    (copy / "timing.json").unlink()

    def too_much(*_):
        raise error

    monkeypatch.setattr(score, "seconds_per_step", too_much)
    assert cli("compare", study, "--out", copy) == 0
    captured = capsys.readouterr()
    assert f"note: no times per step: {error}" in captured.err and "top-k" in captured.out
    assert results_of(copy)["timing"] is None


def test_ended_early_it_reports_on_what_is_there_by_then(study, copy, no_figures, monkeypatch):
    for name in ("results.json", "table.md"):
        (copy / name).unlink()
    shutil.rmtree(copy / "topk")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run_jobs", interrupted)
    assert cli("compare", study, "--out", copy) == 130
    assert results_of(copy)["missing"] == [["topk", 0]]
    assert "DTop-p" in (copy / "table.md").read_text()


def test_a_report_starts_nothing(study, copy, no_figures, monkeypatch, capsys):
    shutil.rmtree(copy / "topk")
    monkeypatch.setattr(compare, "run_jobs", None)
    with in_use(copy):  # by the command that trains
        assert cli("compare", study, "--out", copy, "--report") == 0
    assert capsys.readouterr().out == (copy / "table.md").read_text()
    assert not (copy / "topk").exists()


def test_the_folder_of_a_study_stands_for_it_with_its_changes(finished, copy, no_figures, monkeypatch, capsys):
    monkeypatch.setattr(compare, "run_jobs", None)
    assert cli("compare", copy, "--report") == 0
    assert capsys.readouterr().out == (finished / "table.md").read_text().replace(str(finished), str(copy))
    shutil.rmtree(copy / "topk")
    assert cli("compare", copy, "--list") == 0
    assert capsys.readouterr().out.strip().endswith(f"--out {copy} --only topk/0")


def test_for_a_cluster_it_prints_a_command_for_each_missing_run_which_does_that_one(study, tmp_path, capsys):
    out = tmp_path / "runs"
    words = ("compare", study, "seeds=[0,1]", "metric=null", "--out", out, "--list")
    assert cli(*words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["topk/0", "dtopp/0", "topk/1", "dtopp/1"]
    assert not out.exists()
    command = shlex.split(lines[1])
    assert command[0] == "dit-moe" and cli(*command[1:]) == 0
    capsys.readouterr()
    assert cli(*words) == 0
    assert [line.rsplit(" ", 1)[1] for line in capsys.readouterr().out.splitlines()] == ["topk/0", "topk/1", "dtopp/1"]


def test_a_run_that_fails_is_reported_with_its_last_line_and_the_others_are_kept(
    study, copy, no_figures, monkeypatch, capsys
):
    shutil.rmtree(copy / "dtopp")

    def fail(jobs, share):  # in place of a training that fails
        for job in jobs:
            job.output.parent.mkdir(parents=True)
            job.output.write_text("step 1\nfailed: the loss is nan\n")
        return jobs

    monkeypatch.setattr(compare, "run_jobs", fail)
    assert cli("compare", study, "--out", copy) == 1
    captured = capsys.readouterr()
    assert f"dtopp/0 failed: failed: the loss is nan; all of it is in {copy}" in captured.err
    assert f"dit-moe curves {copy / 'topk' / 'seed-0'}\n" in captured.err
    results = results_of(copy)
    assert results["missing"] == [["dtopp", 0]] and len(results["variants"][0]["runs"]) == 1
    assert "top-k" in captured.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "nothing does not exist; name a file or a built-in study"),
        (["STUDY", "--jobs", "0"], "--jobs=0 must be at least 1"),
        (["STUDY", "--report"], "holds no runs; name their folder by --out"),
        (["STUDY", "sample.target=1.5"], "variant topk: sample.target=1.5: a study compares runs as they were trained"),
        (["STUDY", "--only", "topk"], "--only=topk must be VARIANT/SEED"),
        (["STUDY", "--only", "topk/0", "--variants", "topk"], "--variants says what to run, and --only does not ask"),
        (["STUDY", "--report", "--variants", "topk"], "--variants says what to run, and --report does not ask"),
        (["STUDY", "--variants", "tokp"], "tokp is no variant of the study"),
        (["STUDY", "model.moe.router=topp"], "variant topk: model.moe.router=topp is for all variants, and"),
        (["STUDY", "train.stepz=3"], "variant topk: train.stepz is not a known key; did you mean 'steps'"),
    ],
)
def test_mistakes_are_one_line_before_any_work(study, tmp_path, capsys, words, said):
    words = [study if word == "STUDY" else word for word in words]
    assert cli("compare", *words, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()
