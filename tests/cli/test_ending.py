"""A command ends, on stderr, with where its results are and with commands that go on from them."""

import shlex

import pytest

from dit_moe.cli import main
from dit_moe.cli.ending import end
from tests.cli.conftest import cli


def next_commands(err: str) -> list[list[str]]:
    """The words after `dit-moe` of each."""
    lines = err[err.index("\nnext ") :].splitlines()[1:]
    return [shlex.split(line[9:])[1:] for line in lines]


def test_results_are_named_with_their_sizes_and_commands_are_quoted_for_the_shell(tmp_path, capsys, monkeypatch):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "x").write_bytes(bytes(1500))
    (tmp_path / "a b" / "y").hardlink_to(tmp_path / "a b" / "x")
    monkeypatch.chdir(tmp_path)
    end([tmp_path / "a b", tmp_path / "not made"], ("sample", tmp_path / "a b"), ("eval", "x"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"results  {tmp_path}/a b (1.5 kB)",
        f"next     dit-moe sample '{tmp_path}/a b'",
        "         dit-moe eval x",
    ]
    monkeypatch.setenv("RANK", "1")
    end([tmp_path])
    assert capsys.readouterr().err == "", "another process than the first"


@pytest.mark.parametrize("save", ["npz", "png", "grid"])
def test_the_command_that_sample_ends_with_measures_what_was_sampled(a_run, tmp_path, capsys, save):
    assert cli("sample", a_run, "count=20", "--save", save, "--out", tmp_path / "out of it") == 0
    ((command, measured, *rest),) = next_commands(capsys.readouterr().err)
    assert command == "eval" and (measured == str(a_run) if save == "grid" else "out of it" in measured)
    assert rest == [] if save == "grid" else rest[0] == "digits"
    if save == "npz":
        assert main([command, measured, *rest]) == 0
