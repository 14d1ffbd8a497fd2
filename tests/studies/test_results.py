"""What is gathered of a study's runs: what their logs tell, and on what they were made."""

from dataclasses import replace

import numpy as np
import pytest

from dit_moe.experiments.image import load_experiment
from dit_moe.moe.routers import ROUTERS
from dit_moe.moe.routers.base import Router
from dit_moe.studies import results
from dit_moe.studies.plan import PlannedRun
from dit_moe.studies.results import curves, gather
from dit_moe.studies.score import provenance
from dit_moe.studies.study import Study, Variant
from dit_moe.studies.table import to_markdown
from dit_moe.tasks.train import prepare

from ..cli.conftest import CONFIG

FOUND = {"step": 600, "loss": 0.4, "metric": None, "active": 2.0, "active_layers": [2.0] * 4, "flops": 1e7}


def test_curves_are_means_over_pieces_of_the_log():
    log = [{"step": i + 1, "loss": float(i), "active": float(i % 2), "p": 0.5} for i in range(1000)]
    made = curves(log, moe=True)
    assert len(made["step"]) == 200 and made["step"][:2] == [5, 10] and made["step"][-1] == 1000
    assert made["loss"][0] == 2 and made["active"][0] == pytest.approx(0.4) and made["p"][0] == 0.5
    without = curves([line | {"p": None} for line in log], moe=True)
    assert without["p"] is None and without["active"] is not None
    assert curves([{"step": 1, "loss": 2.0}], moe=False)["active"] is None
    assert curves([{"step": 1, "loss": 1.0, "active": 2.0}], moe=True)["active_std"] == [0.0]
    assert curves([], moe=True) == {"step": [], "loss": [], "active": None, "active_std": None, "p": None}


@pytest.mark.parametrize("lines", [10, 4000])
def test_the_spread_over_steps_is_found_whatever_the_length_of_the_log(lines):
    active = 2 + 0.1 * np.random.default_rng(0).standard_normal(lines)
    made = curves([{"step": i + 1, "loss": 0.0, "active": float(active[i])} for i in range(lines)], moe=True)
    window = min(max(20, lines // 20), lines)
    assert made["active_std"][0] == pytest.approx(np.std(active[:window], ddof=1))
    assert made["active_std"][-1] == pytest.approx(np.std(active[-window:], ddof=1))
    assert np.mean(np.square(made["active_std"])) ** 0.5 == pytest.approx(0.1, rel=0.3)  # of 10 lines; the others 0.1


@pytest.mark.parametrize("name", ROUTERS.names())
def test_a_router_that_says_that_it_is_controlled_moves_something_after_a_step(name):
    config = ROUTERS.config_class(name)()
    assert not config.controlled or ROUTERS.factory(config).after_step is not Router.after_step
    assert config.controlled or name != "dtopp"
    if name == "dtopp":  # a controller without gains controls nothing
        assert not replace(config, controller=replace(config.controller, kp=0.0, ki=0.0)).controlled


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two that are scored, each in another precision, and have no log."""
    variant, experiment = Variant(name="dtopp", label="DTop-p"), prepare(load_experiment(CONFIG))[0]
    planned = [PlannedRun(variant, seed, tmp_path / str(seed), experiment) for seed in (0, 1)]
    scores = {f"dtopp/{seed}": FOUND | {"made": provenance(("fp32", "bf16")[seed])} for seed in (0, 1)}
    monkeypatch.setattr(results, "read_score", lambda study, run: scores[run.name])
    return Study(title="Small", config=CONFIG, variants=(variant,), baseline="dtopp", seeds=(0, 1)), planned


def test_provenance_is_that_of_each_run_and_of_the_timing(runs):
    study, planned = runs
    timing = {"made": provenance("fp32"), "steps": 5, "seconds_per_step": {"dtopp": 0.1}, "identity": {}}
    found = gather(study, "small", planned, timing)
    (variant,) = found.variants
    assert [run.made["precision"] for run in variant.runs] == ["fp32", "bf16"]
    assert found.timing == {"made": timing["made"], "steps": 5} and variant.seconds_per_step == 0.1
    assert gather(study, "small", planned, None).timing is None


def test_runs_without_a_log_are_gathered_and_named(runs):
    study, planned = runs
    planned[1].folder.mkdir()
    (planned[1].folder / "log.jsonl").write_text('{"step": 600, "loss": 0.4, "active": 2.0, "p": 0.5}\n')
    found = gather(study, "small", planned, None)
    without, having = found.variants[0].runs
    assert without.training_active is None and having.training_active["mean"] == 2.0
    assert f"in {planned[0].folder}." in to_markdown(found)


def test_the_balance_of_layers_that_no_token_uses_is_left_out(runs):
    study, planned = runs
    planned[0].folder.mkdir()
    line = '{"step": 600, "loss": 0.4, "active": 2.0, "p": 0.5, "layers": {"balance": [NaN, 1.25]}}\n'
    (planned[0].folder / "log.jsonl").write_text(line)
    (variant,) = gather(study, "small", planned, None).variants
    assert variant.runs[0].balance == 1.25
