"""`dit-moe table`, and eval/table.py."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import cli

SCRIPT = Path(__file__).parents[2] / "eval" / "table.py"


@pytest.fixture
def result(tmp_path):
    provenance = {"samples": [], "extractor": {"name": "digits_cnn64", "is_fid": False}, "n_gen": 450}
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "metrics.json"
    path.write_text(json.dumps({"fd_digits_cnn64": {"generated": 2.083}, "provenance": provenance}))
    return path


def rows(text):
    return [line for line in text.split("\n\n")[0].splitlines() if line.startswith("|")][2:]


def test_own_results_come_first_and_then_the_published_ones_asked_for(result, capsys):
    counts = {}
    for published in ("all", "256", "512", "none"):
        assert cli("table", result, result.parent, "--published", published) == 0
        shown = rows(capsys.readouterr().out)
        assert "2.08" in shown[0] and "2.08" in shown[1]
        counts[published] = len(shown) - 2
    assert counts["none"] == 0 and counts["256"] + counts["512"] == counts["all"] > 20


def test_files_of_the_script_hold_what_is_asked_and_stdout_the_markdown(result, tmp_path, capsys, monkeypatch):
    words = [result, "--out", tmp_path / "t.md", "--csv", tmp_path / "t.csv"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    stdout, stderr = capsys.readouterr()
    assert ended.value.code == 0 and (tmp_path / "t.md").read_text() == stdout and "t.csv" in stderr.splitlines()[-1]
    assert (tmp_path / "t.csv").read_text().splitlines()[1].startswith(f"{result},")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone"], "gone does not exist; name a result of dit-moe eval --out"),
        (["--published", "none"], "no rows; name at least one RUN, or leave out --published none"),
        (["--out", "."], "--out . is a folder; name a file, for instance table.md"),
        (["--csv", "a.md"], "--csv a.md does not end in .csv; name a file that does, for instance a.csv"),
        (["--out", "new/a.md"], "--out new/a.md: the folder new does not exist; make it first"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_remedy(words, message, capsys):
    assert cli("table", *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_no_input_is_overwritten_and_two_names_of_one_file_are_refused(result, tmp_path, capsys):
    (tmp_path / "t.md").write_text("mine")
    (tmp_path / "t.csv").symlink_to(tmp_path / "t.md")
    assert cli("table", result, "--out", tmp_path / "t.md", "--csv", tmp_path / "t.csv") == 2
    assert "are one file; name two" in capsys.readouterr().err and (tmp_path / "t.md").read_text() == "mine"
    before = result.read_bytes()
    assert cli("table", result, "--out", result) == 2
    named, link = result.rename(result.with_suffix(".md")), tmp_path / "link.md"
    link.symlink_to(named)
    for out in (named, result.parent / ".." / "run" / "metrics.md", link):
        assert cli("table", named, "--out", out) == 2
        assert f"would overwrite the RUN {named}; name another file" in capsys.readouterr().err
    assert named.read_bytes() == before
