"""Published results and recipes are those of their sources, and agree with what this package computes itself."""

from collections import Counter
from dataclasses import replace

import pytest

from dit_moe import config
from dit_moe.diffusion import OBJECTIVES, SAMPLERS
from dit_moe.evaluation.results import published_rows
from dit_moe.models import MODELS
from dit_moe.sampling.generator import SampleConfig
from dit_moe.sampling.recipes import SAMPLING, sampling_recipe

TYPED_AGAIN = {  # from the papers' tables, independently of the rows: model → FIDs, with the IS where there is one
    "DiT-XL/2": [(2.27, 278.2), 18.1, 19.5],
    "DiT-B/4": [68.4],
    "DiT-S/2": [68.4],
    "DiT-B/2": [43.5],
    "DiT-L/2": [23.3],
    "SiT-XL/2": [(2.06, 270.3)],
    "DiffMoE-L-E8": [9.60, 9.17],
    "ProMoE-B": [(24.44, 60.4), (6.39, 154)],
    "ProMoE-L": [(11.61, 100.8), (2.79, 244)],
    "ProMoE-XL": [(9.44, 114.9), (2.59, 266)],
    "DSMoE-S-E16": [39.84],
    "DSMoE-B-E16": [20.33],
    "DSMoE-L-E16": [9.80],
    "DSMoE-3B-E16": [7.52],
    "DiffMoE-S-E16": [41.02],
    "DiffMoE-B-E16": [20.83],
    "DiffMoE-L-E16": [11.16, 14.41],
    "DiT-L": [17.01],
    "DiT-L, token choice": [19.06],
    "DiT-L, expert choice": [16.12],
    "LightningDiT-XL/1": [1.35],
    "REPA SiT-XL/2": [1.42],
    "EDM2-XXL": [1.25],
}
ROWS = published_rows()
DITS = {row.model: row for row in ROWS if row.parameters is not None}


@pytest.mark.parametrize("row", DITS.values(), ids=list(DITS))
def test_parameters_are_those_of_our_own_model_of_the_same_size(row):
    sizes = {"in_channels": 4, "input_size": 32, "num_classes": 1000, "learn_sigma": True}
    ours = MODELS.config_class("DiT")(name="DiT-" + row.model.partition("-")[2], **sizes).footprint().total_params
    assert ours == pytest.approx(row.parameters, abs=5001)  # in millions with two decimals: B/2 and B/4 are 0.04 apart


def test_every_number_is_that_of_its_source():
    found: dict[str, list] = {}
    for row in ROWS:
        fid, score = row.values["fid"], row.values.get("inception_score")
        found.setdefault(row.model, []).append(fid if score is None else (fid, score))
    for model, values in TYPED_AGAIN.items():
        assert sorted(found.pop(model), key=str) == sorted(values, key=str), model
    assert not found
    ranges = [row.notes[0] for row in ROWS if row.model == "DiT-XL/2" and row.steps == 400_000]
    assert len(ranges) == 2 and all("published values" in note for note in ranges)


def test_no_row_stands_twice_and_evaluations_follow_from_steps_and_guidance():
    rows = Counter(
        (row.model, row.steps, row.objective, row.sampler, row.guidance, row.source, row.values["fid"]) for row in ROWS
    )
    assert max(rows.values()) == 1
    for row in ROWS:
        assert row.values["fid"] > 0 and row.source and row.image_size in (256, 512)
        if row.evaluations is not None:
            assert row.interval is None and row.evaluations == (250 if row.guidance == 1 else 500), row
        else:
            assert row.guidance != 1, row


# ------------------------------------------------------------------------------------------------------------ recipes

ODDLY_SET = {
    "sampler": {"name": "euler_maruyama", "time_shift": 3.0, "diffusion": "constant", "last_step": 0.5},
    "guidance": {"scale": 7.0, "interval": [0.2, 0.3], "channels": 2},
    "count": 3,
    "labels": [1],
    "weights": "model",
    "target": 1.5,
    "vary": "time",
}


def settings(overrides, tree=None):
    return config.build(SampleConfig, config.override(tree or {}, overrides))


@pytest.mark.parametrize("dial", [{}, {"target": None, "p": [0.3, 0.9]}], ids=repr)
@pytest.mark.parametrize("recipe", SAMPLING.values(), ids=list(SAMPLING))
def test_a_sampling_recipe_leaves_nothing_of_the_runs_own_settings_but_what_its_source_does_not_state(recipe, dial):
    other = {**ODDLY_SET, **dial, "seed": 4, "precision": "bf16"}
    made, plain = settings(recipe.overrides, other), settings(recipe.overrides)
    assert made == replace(plain, seed=4, precision="bf16")
    assert (made.count, made.labels, made.weights) == (50_000, "random", "ema")


@pytest.mark.parametrize("recipe", SAMPLING.values(), ids=list(SAMPLING))
def test_a_sampling_recipe_costs_250_evaluations_or_twice_as_many_guided(recipe):
    made = settings(recipe.overrides)
    trained = OBJECTIVES.build(OBJECTIVES.config_class(recipe.objective)(), num_classes=10)
    evaluations = SAMPLERS.build(made.sampler, trained).evaluations(made.guidance, (4, 32, 32))
    if made.guidance.interval == (0.0, 1.0):
        assert evaluations in ((249, 250) if made.guidance.scale == 1 else (500,))
    else:
        assert 250 < evaluations < 500


def test_the_published_dit_guides_three_channels_and_nothing_else_is_confused_with_it():
    made = settings(SAMPLING["dit-cfg1.5"].overrides)
    assert (made.guidance.scale, made.guidance.channels, made.guidance.interval) == (1.5, 3, (0.0, 1.0))
    assert config.dump(made)["sampler"] == {"name": "ddpm", "steps": 250}
    assert settings(SAMPLING["dit"].overrides).guidance.channels is None


def test_a_recipe_for_another_objective_names_both_and_those_that_fit():
    assert sampling_recipe("dit", "ddpm").name == "dit"
    message = r"--recipe dit samples .* with ddpm, this run .* with flow; .* sit-ode, "
    with pytest.raises(ValueError, match=message) as e:
        sampling_recipe("dit", "flow")
    assert "diffmoe-ddpm" not in str(e.value).split(";")[1]
    with pytest.raises(ValueError, match=r"--recipe dit-cfg is not known; did you mean 'dit-cfg1.5'"):
        sampling_recipe("dit-cfg", "ddpm")


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        (["seed=3", "batch_size=8", "first_stage.tiling=true"], "dit-cfg1.5"),
        (["count=100", "count=50000", "guidance.scale=1.5"], "dit-cfg1.5"),  # says the same again
        (["sampler.steps=50", "labels=balanced"], "dit-cfg1.5, changed: sampler.steps, labels"),
        (["sampler=ddim"], "dit-cfg1.5, changed: sampler.name, sampler.steps"),
        (["guidance.channels=null"], "dit-cfg1.5, changed: guidance.channels"),
    ],
)
def test_the_label_of_a_result_names_what_was_changed(overrides, label):
    assert SAMPLING["dit-cfg1.5"].label(overrides) == label
