"""Another compute budget for a language model, solved on its training tokens."""

import json
import shutil

import pytest

from dit_moe.experiments.run import open_text_run
from tests.cli.conftest import cli
from tests.cli.language import LM_CONFIG, small


@pytest.fixture(scope="module")
def run(finished_text):
    return finished_text / "run"


def scored(folder, *words):
    assert cli("perplexity", folder, *words, "--out", folder / "p.json") == 0
    return json.loads((folder / "p.json").read_text())


@pytest.mark.parametrize("target", [1.0, 1.5, 3.0])
def test_held_out_text_uses_as_many_experts_as_are_asked_for(run, target):
    report = scored(run, f"target={target}")
    assert report["active_experts"] == pytest.approx(target, rel=0.03)
    assert report["target_experts"] == target


def test_each_layer_meets_its_own_target(run):
    report = scored(run, "target=[1.5,3]")
    assert report["active_experts_by_layer"] == pytest.approx([1.5, 3], rel=0.08)  # of other tokens; seen: 6.4 %


def test_p_needs_no_tokens_and_target_says_which_it_misses(run, tmp_path, capsys):
    assert open_text_run(run, ["p=0.5"]).model.blocks[0].moe.router.threshold() == 0.5
    tokens = run.parent / "tokens" / "train"
    tokens.rename(tmp_path / "away")
    try:
        assert cli("perplexity", run, "p=0.5", "--out", tmp_path / "p.json") == 0
        capsys.readouterr()
        assert cli("perplexity", run, "target=3", "--out", tmp_path / "p.json") == 2
        error = capsys.readouterr().err
        assert "sample.target is solved on the tokens that were trained on" in error and "sample.p" in error
    finally:
        (tmp_path / "away").rename(tokens)


def test_an_exported_model_works_with_the_solved_thresholds_and_the_command_says_what_it_is(run, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    capsys.readouterr()
    assert cli("export", run, tmp_path / "out", "target=3") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["folder"], said["step"]) == (str(tmp_path / "out"), 6)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    solved = [block.moe.router.override for block in open_text_run(run, ["target=3"]).model.blocks]
    held = [value.item() for name, value in exported.state_dict().items() if name.endswith("controller.u")]
    assert held == pytest.approx(solved)


def test_the_dial_of_a_language_model_is_measured_in_bits_per_byte(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    assert cli("dial", copy, "--targets", "1,2,4", "--out", tmp_path / "out") == 0
    (entry,) = json.loads((tmp_path / "out" / "dial.json").read_text())["runs"]
    assert [point["target"] for point in entry["points"]] == [None, 1, 2, 4]
    bits = entry["points"][1:]
    assert [one["active"] for one in bits] == pytest.approx([1, 2, 4], rel=0.03)
    assert bits[0]["flops"] < bits[1]["flops"] < bits[2]["flops"]
    assert "held-out bits per byte" in (tmp_path / "out" / "dial.md").read_text()


def test_options_of_images_are_refused_for_language_models(run, capsys):
    assert cli("perplexity", run, "target=[1,2]", "vary=time") == 2
    assert "sample.vary=time is for images" in capsys.readouterr().err
    assert cli("dial", run, "--seeds", "2") == 2
    assert "--seeds is for models of images" in capsys.readouterr().err


def test_previews_and_scores_while_training_use_as_many_experts_as_the_section_sample_says(run, tmp_path):
    words = [*small(run.parent), "train.sample_every=6", "train.checkpoint_every=6", "eval.light_every=6"]
    active = {}
    for name, options in (("trained", []), ("dialled", ["sample.target=3"]), ("set", ["sample.p=0.999"])):
        assert cli("train", LM_CONFIG, "--run", tmp_path / name, *words, *options) == 0
        (line,) = (tmp_path / name / "evaluations.jsonl").read_text().splitlines()
        active[name] = json.loads(line)["heldout_active_experts"]
        assert (tmp_path / name / "samples" / "step_00000006.txt").is_file()
    assert active["dialled"] == pytest.approx(3, rel=0.05)
    assert active["trained"] < 2.5 and active["set"] > 3.5
    weights = ["checkpoints/step_00000006/model.safetensors", "checkpoints/step_00000006/ema.safetensors"]
    assert all(
        (tmp_path / "trained" / each).read_bytes() == (tmp_path / "dialled" / each).read_bytes() for each in weights
    )
