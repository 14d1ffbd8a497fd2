"""`dit-moe perplexity` scores held-out tokens or files of text, and refuses at once what it cannot score."""

import json
import math
import shutil
from pathlib import Path

import pytest

from dit_moe.cli.perplexity import print_table
from dit_moe.experiments.run import open_text_run
from dit_moe.formatting import PlainConsole
from dit_moe.text.corpora.files import FilesConfig
from dit_moe.text.perplexity import score
from dit_moe.text.tokenization import Tokenization, TokenizeConfig
from dit_moe.text.tokenizer import TextTokenizer, TokenizerConfig, open_tokenizer
from tests.cli.conftest import cli

ROOT = Path(__file__).parents[2]
LENGTH = 32
SMALL = [
    "model.name=LM-custom-4E2A",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "model.mlp_hidden=64",
    f"data.length={LENGTH}",
    "train.steps=4",
    "train.batch_size=4",
    "train.warmup_steps=0",
    "train.checkpoint_every=2",
    "train.sample_every=null",
    "eval.light_every=null",
    "eval.stride=null",
]


def text(number):
    return f"Document number {number}. " * (3 + 5 * number) + "Schön."


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on 8 of 12 documents; 4 are held out, numbers 2, 5, 8 and 11."""
    root = tmp_path_factory.mktemp("language")
    (root / "text").mkdir()
    for number in range(12):
        (root / "text" / f"{number:02}.txt").write_text(text(number), encoding="utf-8")
    tokenize(root)
    places = [f"data.path={root / 'train'}", f"data.heldout={root / 'heldout'}"]
    assert cli("train", ROOT / "configs" / "lm_tiny.yaml", "--run", root / "run", *SMALL, *places) == 0
    return root


def tokenize(root, **tokenizer):
    config = TokenizeConfig(
        corpus=FilesConfig(path=str(root / "text"), heldout_every=3), tokenizer=TokenizerConfig(**tokenizer)
    )
    for split in ("train", "heldout"):
        if not (root / split).exists():
            Tokenization(config, root / split, split).run()


def result(out):
    return json.loads(out.read_text())


def test_the_held_out_split_is_scored_by_default_with_all_that_made_the_number(trained, capsys):
    run = trained / "run"
    assert cli("perplexity", run) == 0
    report, printed = result(run / "perplexity.json"), capsys.readouterr()
    assert json.loads(printed.out) == report
    assert "4 documents" in printed.err and "bits per byte" in printed.err and "active experts" in printed.err
    opened = open_text_run(run)
    documents = [(list(text(number).encode()), len(text(number).encode())) for number in (2, 5, 8, 11)]
    wanted = score(opened.model, documents, eos=256, length=LENGTH, vocab_size=320)
    assert report["bits_per_byte"] == pytest.approx(wanted.bits_per_byte, rel=1e-6)
    numbers = wanted.report()
    layers = numbers.pop("active_experts_by_layer")
    assert {name: report[name] for name in numbers} == pytest.approx(numbers, rel=1e-6)
    assert report["active_experts_by_layer"] == pytest.approx(layers) and len(layers) == 2
    assert report["bits_per_byte"] == pytest.approx(report["loss"] / math.log(2), rel=1e-12)  # a token is a byte
    assert report["weights_sha256"] == opened.sha256 and report["step"] == 4 and report["weights"] == "ema"
    assert report["tokenizer"] == {"name": opened.tokenizer.name, "sha256": opened.tokenizer.config.sha256}
    assert report["text"]["fingerprint"] and len(report["thresholds"]) == 2 and report["target_experts"] == 2
    assert report["settings"]["length"] == report["settings"]["stride"] == LENGTH
    assert {"dit_moe", "torch", "transformers"} <= set(report["versions"])


def test_words_are_files_of_a_document_each_or_keys_of_the_sections_eval_and_sample(trained, tmp_path):
    files = [trained / "text" / f"{number:02}.txt" for number in (2, 5, 8, 11)]
    words = {
        "plain": [],
        "files": files,
        "options": ["--stride", 8, "--batch-size", 3, "--max-documents", 2],
        "keys": ["stride=8", "batch_size=3", "eval.max_documents=2"],
        "model": ["weights=model"],
        "bf16": ["sample.precision=bf16"],
    }
    reports = {}
    for name, each in words.items():
        assert cli("perplexity", trained / "run", "--out", tmp_path / f"{name}.json", *each) == 0
        reports[name] = result(tmp_path / f"{name}.json")
    plain, of_files, keys = reports["plain"], reports["files"], reports["keys"]
    assert [each["file"] for each in of_files["text"]["files"]] == list(map(str, files))
    assert of_files == plain | {"text": of_files["text"]}
    assert reports["options"] == keys and keys["documents"] == 2
    assert (keys["settings"]["stride"], keys["settings"]["batch_size"]) == (8, 3)
    assert reports["model"]["weights_sha256"] != plain["weights_sha256"] and reports["model"]["loss"] != plain["loss"]
    assert reports["bf16"]["loss"] != plain["loss"] == pytest.approx(reports["bf16"]["loss"], rel=1e-2)


def test_an_earlier_checkpoint_leaves_its_result_in_the_run_folder_too(trained, capsys):
    assert cli("perplexity", trained / "run" / "checkpoints" / "step_00000002") == 0
    assert f"results  {trained}/run/perplexity.json (" in capsys.readouterr().err
    assert result(trained / "run" / "perplexity.json")["step"] == 2


def test_the_table_fits_a_narrow_terminal_and_leaves_out_what_is_not_known(capsys):
    report = dict.fromkeys(("bits_per_byte", "loss", "perplexity", "active_experts"), 1.5)
    report |= {f"{name}_std_error": None for name in report} | {"step": 7, "target_experts": 2.0}
    report |= {"documents": 1, "tokens": 10**9, "bytes": 4 * 10**9}
    print_table(report, PlainConsole(width=80))
    shown = capsys.readouterr().out
    assert "1,000,000,000 tokens" in shown and "None" not in shown and "target 2" in shown
    print_table(report | {"active_experts": None}, PlainConsole(width=80))
    assert "active experts" not in capsys.readouterr().out


def test_bits_per_byte_of_a_tokenizer_that_loses_text_are_not_comparable_and_say_why(
    trained, tmp_path, capsys, monkeypatch
):
    report = result(trained / "run" / "perplexity.json")
    assert (report["comparable_between_tokenizers"], report["not_comparable_because"]) == (True, [])
    (tmp_path / "text.txt").write_text("ABCDEfghij")
    monkeypatch.setattr(TextTokenizer, "decode_batch", lambda self, ids: ["abcdefghij"])
    monkeypatch.setattr(TextTokenizer, "decode_plain", lambda self, ids: "abcdefghij")
    out = tmp_path / "lossy.json"
    assert cli("perplexity", trained / "run", tmp_path / "text.txt", "--out", out) == 0
    report, shown = result(out), capsys.readouterr().err
    assert report["comparable_between_tokenizers"] is False
    assert "loses text (50.0 % of the bytes, in 1 of the 1 documents" in report["not_comparable_because"][0]
    assert "not comparable between tokenizers" in " ".join(shown.split())


# ------------------------------------------------------------------------------------------------------------ mistakes


def test_bad_input_is_one_message_and_nothing_is_written(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(trained / "run", tmp_path / "run")
    (run / "perplexity.json").unlink(missing_ok=True)
    Path("folder").mkdir()
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes("Café".encode("latin-1"))
    Path("good.txt").write_text("Good.")
    before = sorted(Path().rglob("*"))
    for words, message in (
        (["gone.txt"], "gone.txt does not exist"),
        (["folder"], "folder is a folder; name files of UTF-8 text"),
        (["empty.txt"], "empty.txt is empty; leave it out"),
        (["latin.txt"], "latin.txt is not UTF-8: byte 0xe9 at position 3"),
        (["good.txt", "--out", "folder"], "--out=folder is a folder; name a file"),
        (["good.txt", "--out", "good.txt"], "--out=good.txt is a text to score; name another file"),
        (["--stride", "33"], "eval.stride=33 exceeds data.length=32; lower it"),
        (["--stride", ""], "eval.stride= must be a whole number"),
        (["--stride", "0"], "eval.stride=0 must be at least 1"),
        (["--batch-size", "few"], "eval.batch_size=few"),
        (["--max-documents", "0"], "eval.max_documents=0 must be at least 1"),
        (["strides=3"], "sample.strides is not a known key"),
    ):
        assert cli("perplexity", run, *words) == 2
        printed = capsys.readouterr()
        assert f"error: {message}" in printed.err and not printed.out
        assert sorted(Path().rglob("*")) == before and Path("good.txt").read_text() == "Good."


def test_a_run_of_images_and_a_folder_that_is_no_run_are_refused(finished_run, tmp_path, capsys):
    assert cli("perplexity", finished_run) == 2
    assert "model" in capsys.readouterr().err
    assert cli("perplexity", tmp_path / "gone") == 2
    assert str(tmp_path / "gone") in capsys.readouterr().err


@pytest.fixture
def without_heldout(trained):
    """The run's folder of held-out tokens is elsewhere, for a while."""
    moved = (trained / "heldout").rename(trained / "moved")
    yield trained
    shutil.rmtree(trained / "heldout", ignore_errors=True)
    moved.rename(trained / "heldout")


def test_held_out_tokens_that_are_gone_or_of_another_tokenizer_are_refused(without_heldout, tmp_path, capsys):
    folder = without_heldout / "heldout"
    assert cli("perplexity", without_heldout / "run") == 2
    assert f"{folder} holds no tokens" in capsys.readouterr().err
    other = open_tokenizer(TokenizerConfig())
    other.hf.add_tokens(["Document"])
    other.save(tmp_path / "other")
    tokenize(without_heldout, name=str(tmp_path / "other"))
    assert cli("perplexity", without_heldout / "run") == 2
    message = capsys.readouterr().err
    assert f"data.heldout={folder} was made by the tokenizer" in message
    assert "use that tokenizer, or tokenise the text anew" in message
