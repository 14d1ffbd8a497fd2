"""`dit-moe eval` in this process: its report, or its refusal."""

import json

from .conftest import cli


def evaluate(capsys, *words):
    """The report that the command prints."""
    capsys.readouterr()
    assert cli("eval", *words) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refuse(capsys, *words):
    """The one line that the command ends with."""
    capsys.readouterr()
    assert cli("eval", *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err
