"""A language model from text to text, by the commands."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from dit_moe import checkpoint
from dit_moe.config import OF_A_RUN, WorkFailed
from dit_moe.extras import how_to_install
from dit_moe.text.ngram import TrigramModel
from tests.cli.conftest import CONFIG, cli
from tests.cli.language import LM_CONFIG, small, story


@pytest.fixture
def run(finished_text, tmp_path):
    return Path(shutil.copytree(finished_text / "run", tmp_path / "run"))


def test_one_command_goes_from_text_to_scores_and_a_passage(finished_text, capsys):
    run = finished_text / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    texts = [story(number).encode() for number in range(20)]
    heldout = [texts[number] for number in range(20) if number % 5 == 4]
    assert metrics["bytes"] == sum(map(len, heldout)) and metrics["documents"] == 4
    trigram = TrigramModel([text for text in texts if text not in heldout]).score(heldout).bits_per_byte
    assert metrics["bits_per_byte"]["trigram"] == pytest.approx(trigram)
    assert 4 < metrics["bits_per_byte"]["model"] < 9  # 6 steps from log2(320)
    assert set(metrics["active_experts"]) == {"target", "mean", "std"} and metrics["active_experts"]["target"] == 2
    assert metrics["train_seconds"] > 0 and (run / "curves.png").stat().st_size > 0
    sampled = json.loads((run / "sample.json").read_text())
    assert len(sampled["texts"]) == 1 and sampled["experiment"]["sample"]["prompts"] == ["the ${name}: #1"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step_00000003.txt", "step_00000006.txt"]


def test_a_second_call_goes_by_what_it_says_of_sampling_and_scoring_even_of_one_document(finished_text, run, capsys):
    options = [*small(finished_text), "sample.prompts=[some dogs]", "eval.max_documents=1"]
    capsys.readouterr()
    assert cli("quickstart", LM_CONFIG, "--run", run, *options) == 0
    assert capsys.readouterr().out.startswith("some dogs")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["documents"] == 1 and metrics["bits_per_byte"]["model_std_error"] is None
    heldout = [story(4).encode()]
    trigram = TrigramModel([story(number).encode() for number in range(20) if number % 5 != 4])
    assert metrics["bits_per_byte"]["trigram"] == pytest.approx(trigram.score(heldout).bits_per_byte)


def test_a_damaged_copy_of_the_tokenizer_in_a_run_is_made_anew(finished_text, run, tmp_path):
    copy = run / "tokenizer" / "tokenizer.json"
    wanted = copy.read_bytes()
    copy.write_bytes(b"damaged")
    begun = Path(shutil.copytree(run / "tokenizer", tmp_path / "begun" / "tokenizer")).parent
    (begun / "config.yaml").write_text(OF_A_RUN)  # a run that has no checkpoint yet may begin again with another one
    (run / "config.yaml").unlink()  # its checkpoints say that it is a run, as they do of one by an earlier version
    for folder in (run, begun):
        assert cli("train", LM_CONFIG, "--run", folder, *small(finished_text)) == 0
        assert (folder / "tokenizer" / "tokenizer.json").read_bytes() == wanted


def test_a_folder_tokenizer_of_a_user_in_the_run_folder_stays(finished_text, tmp_path, capsys):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("mine")
    assert cli("train", LM_CONFIG, "--run", tmp_path, *small(finished_text)) == 2
    assert "tokenizer is there already and holds tokenizer.json, which would be lost; move" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["tokenizer", "tokenizer.json"]
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_text() == "mine"


def test_a_preview_that_cannot_be_written_is_a_warning(finished_text, tmp_path, capsys, monkeypatch):
    def run_out(*args, **options):
        raise WorkFailed("out of memory; lower sample.max_new_tokens")

    monkeypatch.setattr("dit_moe.interop.generation.generate_text", run_out)
    words = [*small(finished_text), "eval.light_every=null", "train.steps=2", "train.sample_every=2"]
    assert cli("train", LM_CONFIG, "--run", tmp_path / "run", *words) == 0
    assert "warning: no samples at step 2: out of memory; lower sample.max" in capsys.readouterr().err


def test_the_log_counts_tokens_and_held_out_text_is_scored_during_training(finished_text):
    log = [json.loads(line) for line in (finished_text / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in log] == [256 * step for step in range(1, 7)]
    assert {"loss", "next_token", "tokens_per_s", "active", "p", "aux_balance"} <= set(log[-1])
    state = checkpoint.open_checkpoint(finished_text / "run").state
    assert state["tokens"] == 1536 and state["tokenizer"]["name"] == "bytes"
    scores = [json.loads(line) for line in (finished_text / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in scores] == [3, 6]
    assert scores[1]["heldout_loss"] < scores[0]["heldout_loss"]


def test_sampling_prints_text_behind_each_prompt_the_same_again_for_a_seed_and_greedily_for_any(run, capsys):
    words = ("sample", run, "--prompt", "the cat", "--prompt", "a bird", "max_new_tokens=9", "--out", run / "out")
    assert cli(*words) == 0
    first = capsys.readouterr().out
    assert first.startswith("the cat") and "\na bird" in first
    assert cli(*words) == 0
    assert capsys.readouterr().out == first
    facts = json.loads((run / "out" / "sample.json").read_text())
    assert facts["experiment"]["sample"]["prompts"] == ["the cat", "a bird"] and facts["active_experts"] > 0
    assert cli(*words, "seed=1") == 0
    assert capsys.readouterr().out != first
    greedy = []
    for seed in (0, 1):
        assert cli(*words, "temperature=0", f"seed={seed}") == 0
        greedy.append(capsys.readouterr().out)
    assert greedy[0] == greedy[1]


def test_dry_run_of_tokens_that_are_not_there_yet_needs_the_vocabulary(tmp_path, capsys):
    options = [*small(tmp_path), "--dry-run"]
    assert cli("train", LM_CONFIG, *options, "model.vocab_size=null") == 2
    assert "model.vocab_size is missing" in capsys.readouterr().err
    assert cli("train", LM_CONFIG, *options) == 0
    out = capsys.readouterr().out
    assert "vocab_size: 320" in out and "active per token" in out


def test_what_a_language_model_needs_and_is_not_installed_is_named(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not there
    assert cli("sample", run) == 2
    error = capsys.readouterr().err.strip()
    assert f"needs the package transformers, which is not installed; {how_to_install('transformers')}" in error


def test_scores_of_held_out_tokens_that_have_moved(run, finished_text, tmp_path, capsys):
    moved = shutil.copytree(finished_text / "tokens" / "heldout", tmp_path / "moved")
    assert cli("perplexity", run, f"data.heldout={moved}") == 0
    found = json.loads((run / "perplexity.json").read_text())
    assert found["bits_per_byte"] == json.loads((run / "metrics.json").read_text())["bits_per_byte"]["model"]
    assert cli("perplexity", run, f"data.heldout={tmp_path / 'nowhere'}") == 2
    assert "data.heldout" in capsys.readouterr().err


BAD = {  # words of a command, {run} and {data} filled in: what it says
    "an image config for text": (["tokenize", CONFIG], "model is a model of images"),
    "a text config for images": (["encode", LM_CONFIG], "model is a language model"),
    "judging text as images": (["eval", "{run}"], "model is a language model"),
    "saving text as pictures": (["sample", "{run}", "--save", "png"], "--save: .* leave it out"),
    "an unknown option of sampling": (["sample", "{run}", "temprature=1"], "sample.temprature is not a known key"),
    "an option of scoring for sampling": (["sample", "{run}", "data.heldout=x"], "sample.data is not a known key"),
    "a negative temperature": (["sample", "{run}", "temperature=-1"], "sample.temperature=-1.0 must be at least 0"),
    "a prompt that is no text": (["sample", "{run}", "--prompt", "\udcff"], "prompts holds .*, which is not Unicode"),
    "no tokenizer": (["sample", "{lost}"], "tokenizer is missing; restore it"),
    "another tokenizer": (["sample", "{other}"], "tokenizer"),
    "a vocabulary below the tokenizer's": (
        ["train", LM_CONFIG, "SMALL", "model.vocab_size=256"],
        "model.vocab_size=256 is below the 257 ids of the tokenizer bytes",
    ),
    "a model of text for images to start from": (
        ["train", CONFIG, "--dry-run", "train.init_from={run}"],
        "train.init_from=.* is a run of text, and this model is one of images; name a run of images",
    ),
    "a stride beyond the length": (
        ["quickstart", LM_CONFIG, "SMALL", "eval.stride=33"],
        "eval.stride=33 exceeds data.length=32",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, run, finished_text, tmp_path, capsys):
    words, message = BAD[case]
    lost, other = (Path(shutil.copytree(run, tmp_path / name)) for name in ("lost", "other"))
    shutil.rmtree(lost / "tokenizer")
    changed = other / "tokenizer" / "tokenizer.json"
    changed.write_text(changed.read_text().replace('"a":', '"@@":', 1))
    filled = [str(word).format(run=run, lost=lost, other=other) for word in words]
    if "SMALL" in filled:
        filled[2:3] = ["--run", str(tmp_path / "new"), *small(finished_text)]
    capsys.readouterr()
    assert cli(*filled) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(message, error) and "\n" not in error
    assert not (tmp_path / "new").exists()


def test_held_out_text_that_is_trained_on_is_refused(finished_text, run, tmp_path, capsys):
    tokens = f"data.heldout={finished_text / 'tokens' / 'train'}"
    assert cli("perplexity", run, tokens) == 2
    assert "data.heldout" in capsys.readouterr().err
    assert cli("train", LM_CONFIG, "--run", tmp_path / "run", *small(finished_text), tokens) == 2
    assert "data.heldout" in capsys.readouterr().err
