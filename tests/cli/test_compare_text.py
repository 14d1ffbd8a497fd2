"""`dit-moe compare` for language models: from text to table."""

import json
from pathlib import Path

import pytest

from dit_moe.studies import compare, train_and_score
from tests.studies.examples import run_here

from .conftest import cli
from .test_perplexity import LENGTH, SMALL, text

CONFIG = Path(__file__).parents[2] / "configs" / "lm_tiny.yaml"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("language-study")
    (root / "text").mkdir()
    for number in range(12):
        (root / "text" / f"{number:02}.txt").write_text(text(number), encoding="utf-8")
    changes = [
        *SMALL,
        "train.steps=2",
        f"tokenize={{corpus: {{name: files, path: {root / 'text'}, heldout_every: 3}}, tokenizer: {{name: bytes}}}}",
        f"data.path={root / 'train'}",
        f"data.heldout={root / 'heldout'}",
    ]
    path = root / "words.yaml"
    path.write_text(
        f"title: Words\nconfig: {CONFIG}\nbaseline: topk\nseeds: [0]\nmetric: bits_per_byte\ntiming_steps: 1\n"
        f"changes: {json.dumps(changes)}\n"
        "variants: [{name: topk, changes: [model.moe.router=topk]}, {name: dtopp}]\n"
    )
    return path


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "words"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "run_jobs", run_here)
        assert cli("compare", study, "--out", out) == 0
    return out


def test_it_tokenises_trains_and_scores_by_nats_a_token_and_bits_a_byte(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["finished"] and results["unit"] == "token" and results["loss"]["unit"] == "nats/token"
    assert results["metric"]["name"] == "bits_per_byte"
    for variant in results["variants"]:
        (run,) = variant["runs"]
        assert run["step"] == 2 and run["loss"] > 0 and run["metric"] > 0 and run["flops"] > 0
        assert variant["seconds_per_step"] > 0
    assert results["variants"][0]["runs"][0]["active"] == 2


def test_another_of_its_metrics_is_there_without_scoring_anew(finished, study, monkeypatch):
    monkeypatch.setattr(train_and_score, "score_loss", None)
    words = ["compare", study, "metric=perplexity", "timing_steps=0", "--out", finished]
    assert cli(*words, "--only", "topk/0") == 0
    score = json.loads((finished / "topk" / "seed-0" / "score.json").read_text())
    assert score["metric"]["value"] == score["terms"]["perplexity"] > 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("metric=fid.generated", "metric=fid.generated is none of a language model's: bits_per_byte, perplexity"),
        ("data.heldout=null", "data.heldout is missing"),
        ("sample.target=1", "sample.target=1.0: a study compares runs as they were trained"),
        ("tokenize=null data.heldout=TRAIN", "data.heldout is the same text as data.path"),
    ],
)
def test_what_cannot_be_scored_is_found_before_the_training(finished, study, tmp_path, capsys, change, said):
    changes = change.replace("TRAIN", str(study.parent / "train")).split()
    assert cli("compare", study, *changes, "--out", tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_variants_that_are_scored_in_other_ways_are_refused(study, tmp_path, capsys):
    for change in ("eval.stride=16", f"data.length={LENGTH // 2}", "sample.precision=bf16"):
        variants = f"variants=[{{name: topk}}, {{name: other, changes: ['{change}']}}]"
        assert cli("compare", study, variants, "--out", tmp_path / "out") == 2
        assert f"variant other: {change}, but its baseline topk has" in capsys.readouterr().err
