"""`dit-moe completion` and `--version`."""

import subprocess

import pytest
import torch

from dit_moe import built_in
from dit_moe.cli import COMMANDS

from .conftest import cli

COMPLETE = """
source "$0"
for line in "$@"; do
  read -ra COMP_WORDS <<< "$line"; COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=(); _shtab_dit_moe
  echo "${COMPREPLY[*]}"
done
"""


def test_bash_completes_commands_options_configs_studies_and_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("shtab", reason="shtab is not installed")
    monkeypatch.chdir(tmp_path)
    assert cli("completion", "bash") == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    for name in ("mine", "$(touch run)"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    wanted = {
        "tra": [name for name in COMMANDS if name.startswith("tra")],
        "train --dry": ["--dry-run"],
        "train digits_": [name for name in built_in.names() if name.startswith("digits_")],
        "compare pa": ["paper"],
        "configs sh": ["show"],
        "configs imagenet": ["imagenet256", "imagenet512"],
        "sample runs/mi": ["runs/mine"],
        "eval runs/m": ["runs/mine"],
        "curves runs/m": ["runs/mine"],
        "lm-eval runs/": ["runs/mine", "runs/$(touch", "run)"],
    }
    command = ["bash", "-c", COMPLETE, "./script", *(f"dit-moe {line}" for line in wanted)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [sorted(set(line.split())) for line in found] == [sorted(each) for each in wanted.values()]
    assert not (tmp_path / "run").exists()  # the name of a folder is a name


def test_the_version_names_what_a_report_of_a_fault_needs(capsys):
    assert cli("--version") == 0
    assert f"torch {torch.__version__}, Python 3." in (said := capsys.readouterr().out) and said.count("\n") == 1
