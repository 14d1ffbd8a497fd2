"""Bad input: one clear message, exit code 2 before the work starts (1 in its middle), and nothing overwritten."""

import hashlib
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dit_moe.cli import table
from dit_moe.data import digits
from tests.cli.conftest import CONFIG, SMALL, cli
from tests.folders import contents


def refused(capsys, code: int, message: str, *words: object) -> None:
    capsys.readouterr()
    assert cli(*words) == code
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    told = [line for line in err.splitlines() if line.startswith(("error:", "failed:"))]
    assert len(told) == 1, err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "train.lrr is not a known key; did you mean 'lr'?"),
        ("model.num_classes=7", "model.num_classes=7 contradicts the data, which has 10"),
        ("model.width=100000000", " parameters: they take "),
        ("model.depth=1000000000", "model.depth=1000000000 must be at most 4096"),
        ("model.name=DiT-custom/4-" + "9" * 5000 + "E2A", "99… (5,016 characters) is not DiT-<size>/<patch>"),
        (
            "train.batch_size=1000000000000000",
            "train.batch_size=1,000,000,000,000,000 rows a step: they take 7,450,581",
        ),
        ("train.steps=1" + "0" * 30, "is out of range; give a whole number of 64 bits"),
        ("train.lr=1" + "0" * 400, "train.lr=inf must be a finite number"),
        ("train.workers=1000000", "train.workers=1000000 must be at most 1,024 processes"),
        ("sample.count=1000000000000000", "sample.count=1000000000000000 must be at most 1,000,000,000 images"),
        ("sample.sampler.steps=1000000000000000", "sample.sampler.steps=1000000000000000 must be at most 1,000,000"),
        ("eval.seeds=1000000000", "eval.seeds=1000000000 must be at most 10,000"),
    ],
)
def test_a_mistake_in_the_config_is_refused_before_a_folder_is_made(capsys, tmp_path, override, message):
    folder = tmp_path / "run"
    refused(capsys, 2, message, "train", CONFIG, "--run", folder, *SMALL, override)
    assert not folder.exists()


def test_a_missing_config_file_is_named(capsys, tmp_path):
    refused(capsys, 2, "nowhere.yaml does not exist", "train", tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    "words",
    [
        *(["eval", "{}"], ["eval", "{}", "digits"], ["eval", "{}", "count=4"], ["eval", "digits", "{}"]),
        *(["sample", "{}"], ["routing", "{}"], ["dial", "{}"], ["export", "{}", "out"], ["perplexity", "{}"]),
        *(["table", "{}"], ["curves", "{}"], ["quickstart", "{}"], ["train", "digits", "train.init_from={}"]),
        ["train", "digits", "train.init_from={}", "--dry-run"],
        ["train", "digits", "eval.reference={}", "--dry-run"],
    ],
)
def test_what_is_not_there_is_said_not_to_be_with_what_may_be_meant(capsys, tmp_path, words):
    (tmp_path / "digits").mkdir()
    words = [word.format(tmp_path / "digitz") for word in words]
    refused(capsys, 2, f"{tmp_path}/digitz does not exist (did you mean {tmp_path}/digits?); name a", *words)


@pytest.mark.parametrize("command", ["train", "dial", "eval"])
def test_a_link_to_itself_is_named(capsys, tmp_path, command):
    (tmp_path / "loop").symlink_to("loop")
    refused(
        capsys, 2, f"{tmp_path / 'loop'} does not exist", command, tmp_path / "loop", *["digits"][: command == "eval"]
    )


def test_nan_in_the_data_is_found_before_training(capsys, tmp_path, monkeypatch):
    whole = digits.load_digits()
    raw = SimpleNamespace(images=whole.images.copy(), target=whole.target)
    raw.images[11, 3, 4] = np.nan
    monkeypatch.setattr(digits, "load_digits", lambda: raw)
    folder = tmp_path / "run"
    refused(capsys, 2, "image 11 of the digits has the pixel nan", "train", CONFIG, "--run", folder, *SMALL)
    assert not folder.exists()


@pytest.mark.parametrize("command", ["train", "sample"])
def test_a_truncated_checkpoint_is_refused_and_nothing_is_written(capsys, a_run, command):
    weights = sorted(a_run.glob("checkpoints/*"))[-1] / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    before = contents(a_run)
    words = {"train": [CONFIG, "--run", a_run, *SMALL, "train.steps=6"], "sample": [a_run]}[command]
    refused(capsys, 2, "ema.safetensors has", command, *words)
    assert contents(a_run) == before


def test_weights_of_another_architecture_are_refused(capsys, a_run):
    folder = sorted(a_run.glob("checkpoints/*"))[-1]
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("depth: 2", "depth: 3"))
    refused(capsys, 2, "config.yaml was changed after it was written", "sample", a_run)
    state = folder / "state.json"
    facts = json.loads(state.read_text())
    facts["files"]["config.yaml"]["sha256"] = hashlib.sha256(config.read_bytes()).hexdigest()
    state.write_text(json.dumps(facts))
    refused(capsys, 2, "holds another architecture", "sample", a_run)


@pytest.mark.parametrize("command", ["train", "sample"])
def test_a_folder_that_cannot_be_written_is_named(capsys, finished_run, tmp_path, command):
    blocker = tmp_path / "file"
    blocker.write_text("in the way")  # works for root too, whom permissions do not stop
    target = blocker / "run"
    words = {"train": [CONFIG, "--run", target, *SMALL], "sample": [finished_run, "--out", target]}[command]
    refused(capsys, 2, "cannot be written", command, *words)
    assert blocker.read_text() == "in the way"


def test_a_run_folder_that_is_not_utf8_is_refused_before_training_and_its_weights_are_not_called_damaged(
    capsys, finished_run, tmp_path
):
    place = tmp_path / "caf\udce9"
    refused(capsys, 2, r"caf\udce9 is not UTF-8, and weights there", "train", CONFIG, "--run", place, *SMALL)
    assert not place.exists()
    shutil.copytree(finished_run, place)
    refused(capsys, 2, "is not UTF-8, and weights there cannot be read; rename it", "sample", place)


def test_sampling_nothing_or_an_unknown_class_is_refused(capsys, a_run):
    before = contents(a_run)
    refused(capsys, 2, "sample.count=0 must be at least 1", "sample", a_run, "count=0")
    refused(capsys, 2, "sample.labels=[12] must lie in 0..9", "sample", a_run, "labels=[12]")
    refused(capsys, 2, "sample.sampler.name=ddim", "sample", a_run, "sampler=ddim")
    refused(capsys, 2, "holds no checkpoint", "sample", a_run.parent)
    assert contents(a_run) == before


def test_labels_from_data_that_a_run_did_not_record_are_refused(capsys, a_run):
    path = a_run / "checkpoints" / "step_00000004" / "state.json"
    facts = json.loads(path.read_text())
    del facts["class_counts"]
    path.write_text(json.dumps(facts))
    before = contents(a_run)
    refused(capsys, 2, "sample.labels=data needs the class frequencies", "sample", a_run, "labels=data")
    assert contents(a_run) == before


def test_a_run_that_diverges_stops_with_code_1(capsys, tmp_path):
    words = ["train", CONFIG, "--run", tmp_path, *SMALL, "train.lr=1e38", "train.grad_clip=null", "train.steps=50"]
    refused(capsys, 1, "before the update; the weights were not touched", *words)


def test_unknown_options_and_commands_are_argparse_errors(capsys):
    assert cli("train", CONFIG, "--rum", "x") == 2
    assert cli("fly") == 2
    assert "Traceback" not in capsys.readouterr().err


FAULTS = {
    "a mistake of ours": (KeyError("layer"), "KeyError: 'layer'; this looks like a fault of dit-moe or of the machine"),
    "a library's": (RuntimeError("[red]bad[/x]\n  and more"), "RuntimeError: [red]bad[/x]; this looks like a fault"),
    "text": (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), "UnicodeDecodeError: 'utf-8' codec can't decode byte"),
    "depth": (RecursionError("maximum recursion depth exceeded"), "RecursionError: maximum recursion depth exceeded"),
    "memory": (MemoryError("Unable to allocate 2. TiB"), "out of memory (Unable to allocate 2. TiB); use less data at"),
    "a CPU's memory": (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "out of memory (DefaultCPU"),
    "a silent one": (AssertionError(), "AssertionError: it says nothing; this looks like a fault"),
    "a package that is broken": (
        ModuleNotFoundError("No module named 'x'", name="x"),
        "ModuleNotFoundError: No module",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_any_exception_is_one_line_and_a_file_with_its_trace(capsys, monkeypatch, tmp_path, fault):
    error, message = FAULTS[fault]
    monkeypatch.setattr(table, "make_table", raising(error))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    refused(capsys, 1, f"failed: {message}", "table")
    assert cli("table") == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    traces = [path.read_text() for path in tmp_path.iterdir()]
    assert re.search(r"its stack trace is in (.*)\n", told)[1] in map(str, tmp_path.iterdir())
    assert all("dit-moe table\nTraceback" in each and "in run" in each for each in traces), "the second is a new file"
    assert cli("table", "--traceback") == 1
    assert "in run" in capsys.readouterr().err


def raising(error: Exception):
    def fail(*_: object) -> None:
        raise error

    return fail


def test_the_trace_of_a_run_is_in_its_folder_and_a_refusal_leaves_none(capsys, a_run, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    before = set(contents(a_run))
    assert cli("sample", a_run, "count=0") == 2
    monkeypatch.setattr("dit_moe.tasks.images.sample", raising(ZeroDivisionError("division by zero")))
    assert cli("sample", a_run) == 1
    (made,) = set(contents(a_run)) - before
    assert re.fullmatch(r"trace-[\w-]+\.txt", str(made)) and str(made) in capsys.readouterr().err


@pytest.mark.parametrize("text", ["pipe\x1b[31m", "a\x00b", "\u202egnp.exe", "\udcff", "two\nlines", "[bold]x[/red]"])
def test_a_name_cannot_steer_the_terminal(capsys, tmp_path, text):
    refused(capsys, 2, "is not a known key", "train", CONFIG, f"{text}=1")
    refused(capsys, 2, "", "table", tmp_path / text.replace("\x00", ""))
    assert cli("table", tmp_path / text.replace("\x00", "")) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.removesuffix("\n").isprintable()


def test_a_value_of_a_megabyte_is_not_repeated(capsys):
    refused(capsys, 2, "train.lr=xxxx", "train", CONFIG, "train.lr=" + "x" * 10**6)
    assert cli("train", CONFIG, "train.lr=" + "x" * 10**6) == 2
    assert len(capsys.readouterr().err) < 200


def in_a_fork(*words: object, encoding: str = "utf-8", without: tuple[int, ...] = (), unread: bool = False):
    """Exit code, stdout and stderr of a command in a process of its own."""
    (out, to_out), (err, to_err) = os.pipe(), os.pipe()
    if unread:
        os.close(out)
    child = os.fork()
    if child == 0:
        os.dup2(to_out, 1), os.dup2(to_err, 2), os.close(to_out), os.close(to_err)
        for descriptor in without:
            os.close(descriptor)
        streams = [
            None if each in without else io.TextIOWrapper(io.BufferedWriter(io.FileIO(each, "w")), encoding)
            for each in (1, 2)
        ]
        sys.stdout, sys.stderr = streams
        os._exit(cli(*words))
    os.close(to_out), os.close(to_err)
    said = [b"" if end == out and unread else Path(f"/proc/self/fd/{end}").read_bytes() for end in (out, err)]
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *(each.decode(encoding) for each in said)


def test_a_command_works_in_an_ascii_locale_and_without_its_streams():
    code, table, told = in_a_fork("table", encoding="ascii")
    assert (code, told) == (0, "") and "\\u2013" in table
    assert in_a_fork("table", without=(0, 1)) == (0, "", "")
    assert in_a_fork("table", without=(2,))[:2] == (0, table.encode().decode("unicode_escape"))
    assert in_a_fork("table", "nowhere", without=(0, 2)) == (2, "", "")
    assert in_a_fork("table", unread=True) == (141, "", "")
