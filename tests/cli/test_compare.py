"""`dit-moe compare`: a whole small study, interrupted and not."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from dit_moe.cli import compare
from dit_moe.studies import timing as study_timing
from dit_moe.studies.experiments import plan
from dit_moe.studies.study import load_study
from tests.scripts import in_use

from .conftest import CONFIG, SMALL, cli

PICTURES = ("loss_vs_flops", "active_over_training", "p_over_training", "active_by_layer", "quality_vs_active")


def write(folder, **more):
    changes = json.dumps([*SMALL, "eval.seeds=1", "train.log_every=1"])
    lines = {
        "title": "A small study",
        "config": CONFIG,
        "baseline": "topk",
        "seeds": "[0]",
        "changes": changes,
        "variants": "[{name: topk, label: top-k, changes: [model.moe.router=topk]}, {name: dtopp, label: DTop-p}]",
        "metric": "fd_digits_cnn64.ratio",
        "heldout": "{draws: 1}",
        "timing_steps": 1,
    }
    path = folder / "small.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in (lines | more).items()))
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "compare-small"
    assert cli("compare", study, "--out", out) == 0
    return out


def weights(out):
    """Those at the end: a run that was stopped has saved itself in between, too."""
    files = sorted(out.glob("*/seed-*/checkpoints/step_00000004/*.safetensors"))
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def numbers(out):
    """Of results.json, without what depends on the clock, the folder and the threads of the timing process."""
    results = json.loads((out / "results.json").read_text())
    results.pop("timing")
    for variant in results["variants"]:
        variant.pop("seconds_per_step")
        for run in variant["runs"]:
            run.pop("folder")
    return results


def test_it_leaves_results_a_table_and_pictures(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["finished"] and not results["missing"] and results["study"] == "small"
    assert [variant["name"] for variant in results["variants"]] == ["topk", "dtopp"]
    for variant in results["variants"]:
        (run,) = variant["runs"]
        assert run["step"] == 4 and run["loss"] > 0 and run["metric"] > 0
        assert variant["seconds_per_step"] > 0
        assert 1 <= run["active"] <= 4 and run["flops"] > 0
    assert results["variants"][0]["runs"][0]["active"] == 2
    assert "top-k" in (finished / "table.md").read_text() and "DTop-p" in (finished / "table.csv").read_text()
    for name in PICTURES:
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name


def test_a_second_call_trains_scores_and_times_nothing_and_gives_the_same_results(finished, study, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.suffix != ".png"}
    runs = [path for path in finished.glob("*/seed-0/*") if path.is_file()]
    times = [path.stat().st_mtime_ns for path in runs]
    assert cli("compare", study, "--out", finished) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert [path.stat().st_mtime_ns for path in runs] == times
    assert capsys.readouterr().out == (finished / "table.md").read_text()


def test_killed_at_any_time_it_goes_on_to_the_same_results(finished, study, tmp_path):
    """kill -9 to the command itself; its runs, which nobody told, end with it."""
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "dit_moe.cli", "compare", str(study), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    program = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(out.glob("*/seed-0/checkpoints/step_*")):
        assert program.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    program.send_signal(signal.SIGKILL)
    program.wait()
    assert not (out / "results.json").exists()
    assert cli("compare", study, "--out", out) == 0  # runs still saving themselves are waited for
    assert weights(out) == weights(finished)
    assert numbers(out) == numbers(finished)


def test_times_are_measured_anew_when_what_they_depend_on_changes(finished, study, monkeypatch):
    """And only then. A report takes those of another machine as they are, and says of which they are."""
    path, asked = finished / "timing.json", []
    before = path.read_text()
    monkeypatch.setattr(study_timing, "seconds_per_step", lambda runs, steps: asked.append(steps) or {"topk": 1.0})
    try:
        for change, times in (("timing_steps=1", 0), ("timing_steps=2", 1), ("train.micro_batch=4", 1)):
            path.write_text(before)
            asked.clear()
            assert cli("compare", study, change, "--out", finished) == 0
            assert len(asked) == times, change
        now = json.loads(before)["made"]
        others = {
            "threads": 99,
            "versions": now["versions"] | {"torch": "0.1"},
            "machine": now["machine"] | {"cpu": "abacus"},
        }
        for key, value in others.items():
            timing = json.loads(before)
            timing["made"][key] = value
            path.write_text(json.dumps(timing))
            asked.clear()
            assert cli("compare", study, "--out", finished, "--report") == 0
            made = json.loads((finished / "results.json").read_text())["timing"]["made"]
            assert not asked and made[key] == value
            assert cli("compare", study, "--out", finished) == 0
            assert asked == [1], key
    finally:
        path.write_text(before)
        assert cli("compare", study, "--out", finished, "--report") == 0


def test_variants_are_timed_over_all_their_micro_batches(finished, study):
    whole = load_study(study)
    cut = load_study(study, ["train.micro_batch=3", "train.grad_clip=0.1"])
    for each in (whole, cut):
        runs = plan(each, study.parent, finished)
        seconds = study_timing.seconds_per_step(runs[:1], 1)
        assert seconds["topk"] > 0


def test_without_the_memory_to_time_it_the_rest_is_there(finished, study, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "timing.json").unlink()

    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(study_timing, "seconds_per_step", too_much)
    assert cli("compare", study, "--out", out) == 0
    captured = capsys.readouterr()
    assert "note: no times per step: CUDA out of memory" in captured.err and "top-k" in captured.out
    assert json.loads((out / "results.json").read_text())["timing"] is None


def test_ended_early_it_leaves_what_is_there_by_then(finished, study, tmp_path, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "out")
    for name in ("results.json", "table.md"):
        (out / name).unlink()
    shutil.rmtree(out / "topk")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run_jobs", interrupted)
    assert cli("compare", study, "--out", out) == 130
    assert json.loads((out / "results.json").read_text())["missing"] == [["topk", 0]]
    assert "DTop-p" in (out / "table.md").read_text()


def test_interrupted_before_the_first_run_is_done_it_writes_an_empty_table(study, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run_jobs", interrupted)
    assert cli("compare", study, "--out", tmp_path / "out") == 130
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["missing"]) == 2


def test_a_report_starts_nothing(finished, study, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(out / "topk")
    monkeypatch.setattr(compare, "run_jobs", None)
    with in_use(out):  # by the command that trains
        assert cli("compare", study, "--out", out, "--report") == 0
    assert capsys.readouterr().out == (out / "table.md").read_text()
    assert not (out / "topk").exists()


def test_gpus_are_those_that_the_environment_allows(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(compare, "use_cpu", lambda: False)
    for named, names in ((None, ["0", "1"]), ("2,3", ["2", "3"]), ("GPU-a, GPU-b", ["GPU-a", "GPU-b"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named) if named else monkeypatch.delenv(
            "CUDA_VISIBLE_DEVICES", raising=False
        )
        assert compare.gpu_names() == names
    monkeypatch.setattr(compare, "use_cpu", lambda: True)
    assert compare.gpu_names() == []


def test_a_changed_study_is_not_mixed_with_runs_made_before(finished, study, capsys):
    before = weights(finished)
    assert cli("compare", study, "train.lr=0.5", "--out", finished) == 2
    said = capsys.readouterr().err
    assert "train.lr=0.5 in the study, but the run in" in said and "was trained with 0.004" in said and "--out" in said
    assert weights(finished) == before


def test_for_a_cluster_it_prints_a_command_for_each_missing_run_which_does_that_one(study, tmp_path, capsys):
    out = tmp_path / "runs"
    assert cli("compare", study, "seeds=[0,1]", "--out", out, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["topk/0", "dtopp/0", "topk/1", "dtopp/1"]
    assert not out.exists()
    words = shlex.split(lines[1])
    assert words[0] == "dit-moe" and cli(*words[1:]) == 0
    capsys.readouterr()
    assert cli("compare", study, "seeds=[0,1]", "--out", out, "--list") == 0
    assert [line.rsplit(" ", 1)[1] for line in capsys.readouterr().out.splitlines()] == ["topk/0", "topk/1", "dtopp/1"]


def test_a_run_that_fails_is_reported_with_its_last_words_and_the_others_are_kept(tmp_path, capsys):
    path = write(
        tmp_path,
        variants="[{name: topk, changes: [model.moe.router=topk]}, "
        "{name: bad, changes: [train.lr=1e30, train.warmup_steps=0]}]",
    )
    assert cli("compare", path, "--out", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "bad/0 failed: " in captured.err and "output.txt" in captured.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["missing"] == [["bad", 0]] and len(results["variants"][0]["runs"]) == 1
    assert "topk" in captured.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "nothing is neither a file nor a built-in study"),
        (["STUDY", "--jobs", "0"], "--jobs=0 must be at least 1"),
        (["STUDY", "--report"], "holds no runs; name their folder by --out"),
        (["STUDY", "metric=fid.generated"], "metric=fid.generated is no number of the evaluation's report"),
        (["STUDY", "sample.target=1.5"], "variant topk: sample.target=1.5: a study compares runs as they were trained"),
        (["STUDY", "--only", "topk"], "--only=topk must be VARIANT/SEED"),
        (["STUDY", "train.stepz=3"], "variant topk: train.stepz is not a known key; did you mean 'steps'"),
    ],
)
def test_mistakes_are_one_line_before_any_work(study, tmp_path, capsys, words, said):
    words = [study if word == "STUDY" else word for word in words]
    assert cli("compare", *words, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()
