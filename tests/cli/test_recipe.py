"""`sample --recipe`: a published baseline's settings, with one's own over them."""

import json

from tests.cli.conftest import cli


def test_a_recipe_comes_before_ones_own_settings_and_the_result_names_both(a_run):
    assert cli("sample", a_run, "--out", a_run / "plain") == 0
    assert json.loads((a_run / "plain" / "sample.json").read_text())["recipe"] is None
    assert cli("sample", a_run, "count=3", "--recipe", "sit-ode", "sampler.steps=2", "--out", a_run / "out") == 0
    facts = json.loads((a_run / "out" / "sample.json").read_text())
    settings = facts["experiment"]["sample"]
    assert (settings["sampler"]["steps"], settings["count"], settings["labels"]) == (2, 3, "random")
    assert facts["recipe"] == "sit-ode, changed: sampler.steps, count"


def test_a_recipe_that_does_not_fit_the_run_is_bad_input(a_run, capsys):
    before = sorted(a_run.rglob("*"))
    assert cli("sample", a_run, "--recipe", "dit") == 2
    assert "--recipe dit samples networks trained with ddpm, this run was trained with flow" in capsys.readouterr().err
    assert cli("sample", a_run, "--recipe", "sit-sde-cfg1.5") == 2
    assert "sample.guidance.channels=3 exceeds the 1 channels" in capsys.readouterr().err
    assert sorted(a_run.rglob("*")) == before
