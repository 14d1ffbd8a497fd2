"""Routers and the like from outside the package: `--plugin`, entry points, and what a run records of them."""

import sys
from importlib.metadata import EntryPoint

import pytest

from dit_moe import plugins
from dit_moe.cli import main
from dit_moe.config import load
from dit_moe.moe import ROUTERS
from tests.cli.conftest import SMALL
from tests.shown import ROOT, blocks

TRAIN = ["train", "digits", "--run", "run", *SMALL, "train.steps=1", "model.moe.router=minp"]


@pytest.fixture
def forget(tmp_path, monkeypatch):
    """The working folder has a plugin, my_router.py; what is returned makes this process one that never loaded it."""
    (tmp_path / "my_router.py").write_text(blocks(ROOT / "docs" / "extending.md", "python")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(plugins, "_asked", [])

    def forget():
        sys.modules.pop("my_router", None)
        ROUTERS._entries.pop("minp", None)
        plugins.load_installed.cache_clear()

    forget()
    yield forget
    forget()


def test_a_run_records_its_plugin_and_its_code_runs_again_only_if_the_command_names_it(forget, capsys):
    assert main([*TRAIN, "--plugin", "my_router"]) == 0
    assert "next" in (said := capsys.readouterr().err) and "run --plugin=my_router" in said
    assert load("run/config.yaml")["plugins"] == ["my_router"]
    forget()
    capsys.readouterr()
    assert main(["sample", "run"]) == 2
    assert (
        "plugins=my_router would run the code of that module; if you trust it, give --plugin" in capsys.readouterr().err
    )
    assert "my_router" not in sys.modules
    assert main(["sample", "run", "count=1", "--plugin", "my_router"]) == 0


def test_an_installed_plugin_is_loaded_unasked(forget, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    entries = [EntryPoint("mine", "my_router", plugins.GROUP)]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: entries)
    plugins.require_loaded({"plugins": ["my_router"]})
    assert "minp" in ROUTERS.names()


def test_the_processes_of_a_study_load_the_plugin_too(forget, capsys):
    assert main(["compare", "digits", "--list", "--plugin", "my_router"]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert commands and all(line.endswith("--plugin=my_router") for line in commands)


@pytest.mark.parametrize(
    "code, said",
    [
        (None, "--plugin other: there is no module other; put its folder on PYTHONPATH"),
        ("\n1 / 0", "--plugin other failed as other was imported: ZeroDivisionError division by zero (other.py:2)"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_refused_before_any_work(forget, tmp_path, capsys, code, said):
    if code is not None:
        (tmp_path / "other.py").write_text(code)
    assert main([*TRAIN, "--plugin", "other"]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()
