"""`sample --recipe`, `eval --sampling`: a published baseline's settings, with one's own over them."""

import json

import pytest

from tests.cli.conftest import cli, evaluate


@pytest.mark.parametrize("section", ["", "sample."])
def test_a_recipe_comes_before_ones_own_settings_and_the_results_name_both(section, a_run, capsys):
    own = [f"{section}count=3", f"{section}sampler.steps=2"]
    assert cli("sample", a_run, "--out", a_run / "plain") == 0
    assert json.loads((a_run / "plain" / "sample.json").read_text())["recipe"] is None
    assert cli("sample", a_run, *own, "--recipe", "sit-ode", "--out", a_run / "out") == 0
    facts = json.loads((a_run / "out" / "sample.json").read_text())
    settings = facts["experiment"]["sample"]
    assert (settings["sampler"]["steps"], settings["count"], settings["labels"]) == (2, 3, "random")
    assert facts["recipe"] == "sit-ode, changed: sampler.steps, count"
    report = evaluate(capsys, a_run, *own, "--sampling", "sit-ode", "--seeds", "1")
    assert report["provenance"]["sampling"] == facts["recipe"]


def test_a_recipe_that_does_not_fit_the_run_is_bad_input(a_run, capsys):
    before = sorted(a_run.rglob("*"))
    assert cli("sample", a_run, "--recipe", "dit") == 2
    assert "--recipe dit samples networks trained with ddpm, this run was trained with flow" in capsys.readouterr().err
    assert cli("sample", a_run, "--recipe", "sit-sde-cfg1.5") == 2
    assert "sample.guidance.channels=3 exceeds the 1 channels" in capsys.readouterr().err
    assert sorted(a_run.rglob("*")) == before
