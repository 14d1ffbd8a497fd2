"""The commands do what the README says, and the scripts are the same commands."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_moe.cli import COMMANDS
from dit_moe.diffusion import SamplingError
from dit_moe.sampling.generator import Generator, SampleConfig
from dit_moe.sampling.labels import choose_labels
from tests.cli.conftest import CONFIG, SMALL, cli
from tests.data.examples import class_files, write_tree
from tests.folders import contents

ROOT = Path(__file__).parents[2]
SCRIPTS = [*ROOT.glob("*.py"), *ROOT.glob("eval/*.py")]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_dry_run_prints_config_sizes_and_costs_and_builds_nothing(capsys, tmp_path):
    folder = tmp_path / "run"
    assert cli("train", CONFIG, "--run", folder, "--dry-run", "train.steps=10", "train.batch_size=32") == 0
    out = capsys.readouterr().out
    assert "target: 2.0" in out and "# parameters" in out and "active per token" in out
    assert "10 steps, 320 images" in out and "FLOPs per image" in out
    assert "# experts           grouped, which is what model.moe.implementation=auto means there" in out
    assert not folder.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["train.init_from={run}", "model.moe.router=topk"],
            "step_00000004, trained with model.moe.router.name=dtopp (here topk), holds another architecture (",
        ),
        (["train.trackers=[trackio]"], "train.trackers=trackio is not installed; pip install "),
        (["train.compile=true"], "train.compile=true needs the compiler no-such-compiler; install it"),
        (["sample.compile=true", "train.sample_every=2"], "sample.compile=true needs the compiler"),
        (["sample.labels=[cat]"], "sample.labels"),
        (["eval.reference={run}/grid.jpg"], "grid.jpg does not exist"),
        (
            ["data={{name: image_folder, path: {tree}, heldout: {tree}/nowhere}}"],
            "data.heldout={tree}/nowhere does not",
        ),
        (["data={{name: image_folder, path: {tree}}}", "eval.extractor=digits_cnn"], "digits_cnn64 takes"),
    ],
)
def test_a_dry_run_is_refused_for_what_would_be_refused_later_and_writes_nothing(
    finished_run, tmp_path, capsys, monkeypatch, changes, message
):
    tree = write_tree(tmp_path / "tree", class_files(each=2))
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    monkeypatch.setenv("CXX", "no-such-compiler")
    before, places = contents(finished_run), {"run": finished_run, "tree": tree}
    words = [*SMALL, "--run", tmp_path / "run", *(each.format(**places) for each in changes)]
    assert cli("train", CONFIG, "--dry-run", *words) == 2
    out, err = capsys.readouterr()
    assert message.format(**places) in err and not out
    assert contents(finished_run) == before and not (tmp_path / "run").exists()


def test_sample_writes_images_grid_and_every_setting(a_run):
    assert cli("sample", a_run, "count=25", "seed=3", "guidance.scale=1.5", "--out", a_run / "more") == 0
    images = np.load(a_run / "more" / "images.npz")
    assert images["arr_0"].shape == (25, 8, 8, 1) and images["arr_0"].dtype == np.uint8
    assert images["labels"].tolist() == [i % 10 for i in range(25)]
    facts = json.loads((a_run / "more" / "sample.json").read_text())
    settings = facts["experiment"]["sample"]
    assert settings["seed"] == 3 and settings["guidance"]["scale"] == 1.5
    assert facts["step"] == 4 and facts["evaluations"] == 8  # 2 Heun steps, two evaluations each, guided
    assert facts["active_experts"] > 0 and len(facts["thresholds"]) == 2
    assert facts["device"] == "cpu" and facts["processes"] == 1 and len(facts["weights_sha256"]) == 64
    assert Image.open(a_run / "more" / "grid.png").size[0] > 32


def test_labels_from_the_data_are_as_frequent_as_in_training(a_run):
    state = json.loads((a_run / "checkpoints" / "step_00000004" / "state.json").read_text())
    assert len(state["class_counts"]) == 10 and sum(state["class_counts"]) == 898
    assert cli("sample", a_run, "labels=data", "count=50", "--out", a_run / "out") == 0
    labels = np.load(a_run / "out" / "images.npz")["labels"]
    plan = SampleConfig(labels="data", count=50)
    assert np.array_equal(labels, choose_labels(plan, 10, state["class_counts"]))


def test_the_ema_weights_are_sampled_unless_asked_otherwise(a_run):
    pictures = []
    for weights in ("ema", "model", "ema"):
        assert cli("sample", a_run, f"weights={weights}", "--out", a_run / "out") == 0
        pictures.append(np.load(a_run / "out" / "images.npz")["arr_0"])
    assert np.array_equal(pictures[0], pictures[2]) and not np.array_equal(pictures[0], pictures[1])


def test_an_older_checkpoint_can_be_sampled_by_naming_its_folder(a_run):
    assert cli("sample", a_run / "checkpoints" / "step_00000002", "--out", a_run / "old") == 0
    assert json.loads((a_run / "old" / "sample.json").read_text())["step"] == 2
    assert cli("sample", a_run / "checkpoints" / "step_00000002") == 0  # into the run folder, not the checkpoint
    assert json.loads((a_run / "sample.json").read_text())["step"] == 2


def test_quickstart_does_everything_and_a_second_call_trains_nothing_and_samples_as_it_is_asked_now(tmp_path, capsys):
    folder = tmp_path / "quick"
    words = ["quickstart", CONFIG, "--run", folder, *SMALL]
    assert cli(*words) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["fd_digits_cnn64"]) >= {"generated", "floor", "ratio", "n", "seeds"}
    assert metrics["fd_digits_cnn64"]["seeds"] == 3 and metrics["fd_digits_cnn64"]["n"] == 20
    assert 0 <= metrics["class_accuracy"] <= 1
    assert set(metrics["active_experts"]) == {"target", "mean", "std"}
    assert metrics["train_seconds"] > 0
    assert Image.open(folder / "grid.png").size[0] > 32 and Image.open(folder / "curves.png").size[0] > 400
    further_seeds = {str(path.relative_to(folder)) for path in folder.glob("samples/seed_*/*.*")}
    assert further_seeds == {f"samples/seed_{seed}/{name}" for seed in (1, 2) for name in ("images.npz", "sample.json")}
    before = (folder / "log.jsonl").read_text()
    assert cli(*words, "sample.sampler.steps=3", "sample.weights=model", "sample.seed=5", "eval.seeds=1") == 0
    assert (folder / "log.jsonl").read_text() == before
    assert "is finished" in capsys.readouterr().err
    sample = json.loads((folder / "sample.json").read_text())["experiment"]["sample"]
    assert (sample["sampler"]["steps"], sample["weights"], sample["seed"]) == (3, "model", 5)


def test_a_run_whose_config_has_dollars_goes_on_and_is_read(a_run):
    words = [*SMALL, "eval.reference=data/${USER_DIR}/x", "train.steps=5"]
    assert cli("train", CONFIG, "--run", a_run, *words) == 0
    assert cli("train", a_run / "config.yaml", "--run", a_run, "train.steps=6") == 0
    assert cli("sample", a_run) == 0
    facts = json.loads((a_run / "sample.json").read_text())
    assert (facts["step"], facts["experiment"]["eval"]["reference"]) == (6, "data/${USER_DIR}/x")


@pytest.mark.parametrize(
    ("change", "starts_from"),
    [
        ("train.batch_size=4", True),
        ("train.schedule=constant", True),
        ("model.moe.router.renormalize=false", True),
        ("model.width=48", False),
    ],
)
def test_the_way_that_a_refused_resumption_names_can_be_followed_to_the_letter(a_run, capsys, change, starts_from):
    words = ["train", CONFIG, *SMALL, change]
    assert cli(*words, "--run", a_run) == 2
    said = capsys.readouterr().err
    advice = re.search(r"or begin .* with (.*)$", said, re.M)[1].split()
    assert f"differs from the run in {a_run}, which has " in said
    assert advice == [f"train.init_from={a_run}"] * starts_from + ["--run", f"{a_run}-2"]
    assert cli(*words, *advice) == 0
    said = capsys.readouterr().err
    assert (f"starts from {a_run}" in said) == starts_from
    told = "was trained with model.moe.router.renormalize=True (here False)"  # which no shape of the weights tells
    assert (told in said) == ("renormalize" in change) and ("was trained with" in said) == (told in said)


@pytest.mark.parametrize("command", ["sample", "train"])
def test_a_config_of_a_run_that_was_edited_is_ignored_with_a_note(a_run, capsys, command):
    settings = a_run / "config.yaml"
    words = ["sample", a_run] if command == "sample" else ["train", CONFIG, *SMALL, "--run", a_run]
    assert cli(*words) == 0 and "differs from the checkpoint" not in capsys.readouterr().err
    settings.write_text(settings.read_text().replace("  count: 10\n", "  count: 7\n"))
    assert cli(*words) == 0
    told = f"note: {settings} differs from the checkpoint's config in sample.count and is ignored; change settings by"
    assert told in capsys.readouterr().err


def test_quickstart_of_a_dense_model_reports_no_experts(tmp_path):
    folder = tmp_path / "dense"
    dense = ["model.name=DiT-custom/4", "model.moe=null", "eval.seeds=1"]
    assert cli("quickstart", CONFIG, "--run", folder, *SMALL, *dense) == 0
    assert json.loads((folder / "metrics.json").read_text())["active_experts"] is None


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "objective=ddpm",
            "sample.sampler={name: ddpm, steps: 4}",
            "model.moe={router: topk, activation: swiglu, shared_experts: 1, shared_hidden: 24, bias: true}",
        ],
        [
            "objective={name: ddpm, prediction: v, variance: fixed_small}",
            "sample.sampler={name: dpm++, steps: 4}",
            "model.activation=silu",
            "model.moe={router: {name: topp, p: 0.4}, every: 2}",
        ],
        [
            "objective={name: flow, path: gvp, time: logit_normal}",
            "sample.sampler={name: euler_maruyama, steps: 4}",
            "model.moe={router: {name: dtopp, layerwise: true, controller: {law: paper, p0: 0.4}}}",
        ],
        [
            "train.mixed_precision=bf16",
            "model.recompute=true",
            "model.qk_norm=true",
            "model.position_embedding=rotary",
            "model.norm=rms_norm",
            "model.activation=swiglu",
        ],
    ],
    ids=lambda overrides: overrides[0][:40],
)
def test_every_kind_of_experiment_trains_and_samples(tmp_path, overrides):
    folder = tmp_path / "run"
    small = [word for word in SMALL if not word.startswith("sample.sampler") or "sampler" not in str(overrides)]
    assert cli("train", CONFIG, "--run", folder, *small, *overrides) == 0
    assert cli("sample", folder, "count=4") == 0


def test_a_script_is_its_command_and_runs_from_any_folder(tmp_path):
    for script in SCRIPTS:
        command = re.search(r'sys\.exit\(main\(\["([\w-]+)", \*sys\.argv\[1:\]\]\)\)$', script.read_text().strip())
        assert re.fullmatch(r"train_\w+_cnn", script.stem) or command[1] in COMMANDS
    words = [sys.executable, str(ROOT / "train.py"), CONFIG, "--dry-run"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "# parameters" in done.stdout, done.stderr


def test_a_grid_is_saved_every_so_many_steps_and_one_that_cannot_be_made_is_a_warning(tmp_path, capsys, monkeypatch):
    batches, errors = Generator.batches, [ValueError("no latents"), SamplingError("the latents are not finite")]

    def fail_twice(*args, **kwargs):
        if errors:
            raise errors.pop(0)
        return batches(*args, **kwargs)

    monkeypatch.setattr(Generator, "batches", fail_twice)
    assert cli("train", CONFIG, "--run", tmp_path, *SMALL, "train.sample_every=1") == 0
    told = capsys.readouterr().err
    assert "warning: no samples at step 1: no latents" in told
    assert "warning: no samples at step 2: the latents are not finite" in told
    assert names(tmp_path / "samples") == {"step_00000003.png", "step_00000004.png"}
    assert Image.open(tmp_path / "samples" / "step_00000004.png").size[1] > 32


def test_sample_writes_the_kinds_named_and_says_which(a_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli("sample", a_run, "--save", "gif", "--out", out) == 2
    assert "error: --save=gif: 'gif' is no kind of output" in capsys.readouterr().err
    assert cli("sample", a_run, "--prompt", "a cat", "--out", out) == 2
    assert "makes images; leave it out" in capsys.readouterr().err
    assert not out.exists()
    assert cli("sample", a_run, "count=15", "--save", "png,npz", "--out", out) == 0
    assert names(out) == {"png", "images.npz", "sample.json"} and len(list((out / "png").glob("*.png"))) == 15
    assert json.loads((out / "sample.json").read_text())["files"] == ["png", "images.npz"]
    assert cli("sample", a_run, "count=4", "labels=7", "--save", "png", "--out", out) == 0
    assert names(out / "png") == {*(f"{i:06d}.png" for i in range(4)), "labels.json"}
    facts = json.loads((out / "sample.json").read_text())
    assert facts["files"] == ["png"] and facts["class_names"] == {"7": "7"}
    labels = json.loads((out / "png" / "labels.json").read_text())
    assert labels.pop("classes") == list("0123456789") and list(labels.values()) == [7] * 4


def test_a_sampler_that_fails_midway_leaves_no_half_of_a_set(finished_run, tmp_path, monkeypatch, capsys):
    batches = Generator.batches

    def failing(self, *args):
        yield from [next(batches(self, *args))]
        raise SamplingError("the latents are not finite")

    monkeypatch.setattr(Generator, "batches", failing)
    assert cli("sample", finished_run, "count=10", "batch_size=5", "--save", "npz,png,grid", "--out", tmp_path) == 1
    assert "failed: the latents are not finite" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    monkeypatch.undo()
    assert cli("sample", finished_run, "guidance.scale=1e38", "--out", tmp_path) == 1  # it overflows, by itself
    assert "failed: " in capsys.readouterr().err
