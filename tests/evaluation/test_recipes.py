"""Recipes say all that their sources do, and what makes a result incomparable is named."""

import json
from dataclasses import replace

import pytest

from dit_moe import config
from dit_moe.diffusion import OBJECTIVES, SAMPLERS
from dit_moe.evaluation.recipes import ADM_50K, SAMPLING, Conditions, not_comparable, sampling_recipe
from dit_moe.generate import SampleConfig

BY_THE_BOOK = Conditions(
    extractor="inception",
    is_fid=True,
    metrics=ADM_50K.metrics,
    n_generated=50_000,
    seeds=1,
    image_shape=(3, 256, 256),
    resized=False,
    reference_statistics=True,
    reference_images=10_000,
    balanced_labels=False,
)
ODDLY_SET = {
    "sampler": {"name": "euler_maruyama", "time_shift": 3.0, "diffusion": "constant", "last_step": 0.5},
    "guidance": {"scale": 7.0, "interval": [0.2, 0.3], "channels": 2},
    "count": 3,
    "labels": [1],
    "weights": "model",
    "target": 1.5,
}


def settings(overrides, tree=None):
    return config.build(SampleConfig, config.override(tree or {}, overrides))


@pytest.mark.parametrize("recipe", SAMPLING.values(), ids=list(SAMPLING))
def test_a_sampling_recipe_leaves_nothing_of_the_runs_own_settings_but_what_its_source_does_not_state(recipe):
    other = {**ODDLY_SET, "seed": 4, "precision": "bf16"}
    made, plain = settings(recipe.overrides, other), settings(recipe.overrides)
    assert made == replace(plain, seed=4, precision="bf16")
    assert (made.count, made.labels, made.weights) == (50_000, "random", "ema")


@pytest.mark.parametrize("recipe", SAMPLING.values(), ids=list(SAMPLING))
def test_a_sampling_recipe_costs_250_evaluations_or_twice_as_many_guided(recipe):
    made = settings(recipe.overrides)
    trained = OBJECTIVES.build(OBJECTIVES.config_class(recipe.objective)(), num_classes=10)
    evaluations = SAMPLERS.build(made.sampler, trained).evaluations(made.guidance, (4, 32, 32))
    if made.guidance.interval == (0.0, 1.0):
        assert evaluations == (250 if made.guidance.scale == 1 else 500)
    else:
        assert 250 < evaluations < 500


def test_the_published_dit_guides_three_channels_and_nothing_else_is_confused_with_it():
    made = settings(SAMPLING["dit-cfg1.5"].overrides)
    assert (made.guidance.scale, made.guidance.channels, made.guidance.interval) == (1.5, 3, (0.0, 1.0))
    assert config.dump(made)["sampler"] == {"name": "ddpm", "steps": 250}
    assert settings(SAMPLING["dit"].overrides).guidance.channels is None


def test_a_recipe_for_another_objective_names_both_and_those_that_fit():
    assert sampling_recipe("dit", "ddpm").name == "dit"
    with pytest.raises(
        ValueError, match=r"--recipe dit samples .* with ddpm, this run .* with flow; .* sit-ode, "
    ) as e:
        sampling_recipe("dit", "flow")
    assert "diffmoe-ddpm" not in str(e.value).split(";")[1]
    with pytest.raises(ValueError, match=r"--recipe dit-cfg is not known; did you mean 'dit-cfg1.5'"):
        sampling_recipe("dit-cfg", "ddpm")


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        ([], "dit-cfg1.5"),
        (["seed=3", "batch_size=8", "first_stage.tiling=true"], "dit-cfg1.5"),
        (["count=50000", "guidance.scale=1.5"], "dit-cfg1.5"),  # says the same again
        (["count=100", "count=50000"], "dit-cfg1.5"),
        (["count=100"], "dit-cfg1.5, changed: count"),
        (["sampler.steps=50", "labels=balanced"], "dit-cfg1.5, changed: sampler.steps, labels"),
        (["sampler=ddim"], "dit-cfg1.5, changed: sampler.name, sampler.steps"),
        (["guidance.channels=null"], "dit-cfg1.5, changed: guidance.channels"),
    ],
)
def test_the_label_of_a_result_names_what_was_changed(overrides, label):
    assert SAMPLING["dit-cfg1.5"].label(overrides) == label


def test_a_result_by_the_book_is_comparable():
    assert not_comparable(BY_THE_BOOK) == []
    assert not_comparable(replace(BY_THE_BOOK, image_shape=(3, 512, 512), balanced_labels=None)) == []
    assert not_comparable(replace(BY_THE_BOOK, metrics=("fd",), reference_images=0)) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"is_fid": False, "extractor": "digits_cnn64"}, "the features are those of digits_cnn64, not of the verified"),
        ({"n_generated": 5_000}, "5 000 generated images instead of 50 000"),
        ({"n_generated": 50_001}, "50 001 generated images instead of 50 000"),
        ({"seeds": 3}, "the mean over 3 sampling seeds"),
        ({"image_shape": (3, 64, 64)}, "images of 64×64 pixels instead of 256×256 or 512×512"),
        ({"image_shape": (3, 256, 512)}, "images of 256×512 pixels"),
        ({"image_shape": (1, 256, 256)}, "images of 1 channel instead of 3"),
        ({"resized": True}, "the images were resized"),
        ({"reference_statistics": False}, "statistics were computed here, not published with it"),
        ({"reference_images": 0}, "precision and recall against 0 reference images instead of 10 000"),
        ({"balanced_labels": True}, "as many images of each class"),
    ],
    ids=json.dumps,
)
def test_each_deviation_is_a_reason_of_its_own(change, reason):
    (found,) = not_comparable(replace(BY_THE_BOOK, **change))
    assert reason in found


def test_all_reasons_are_listed():
    everything = {"is_fid": False, "n_generated": 100, "seeds": 2, "image_shape": (1, 8, 8), "resized": True}
    assert len(not_comparable(replace(BY_THE_BOOK, **everything, reference_statistics=False, reference_images=9))) == 8
