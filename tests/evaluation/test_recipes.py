"""Recipes say all that their sources do, and what makes a result incomparable is named."""

import json
from dataclasses import replace

import pytest

from dit_moe import config
from dit_moe.diffusion import OBJECTIVES, SAMPLERS
from dit_moe.evaluation.recipes import ADM_50K, SAMPLING, Conditions, in_general, not_comparable, sampling_recipe
from dit_moe.sampling.generator import SampleConfig

BY_THE_BOOK = Conditions(
    extractor="inception",
    is_fid=True,
    metrics=ADM_50K.metrics,
    changed_metrics=(),
    n_generated=50_000,
    seeds=1,
    image_shape=(3, 256, 256),
    altered=(),
    reference_statistics=True,
    reference_count=50_000,
    reference_images=10_000,
    reference_side=256,
    labels="random",
    weights="ema",
    precision="fp32",
    dial=None,
)
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


BIG = {"image_shape": (3, 512, 512), "reference_side": 512}
UNSAID = {"labels": None, "weights": None, "precision": None, "reference_count": None}


@pytest.mark.parametrize("change", [{}, BIG, UNSAID, {"metrics": ("fd",), "reference_images": 5}], ids=json.dumps)
def test_a_result_by_the_book_is_comparable(change):
    assert not_comparable(replace(BY_THE_BOOK, **change)) == []


DEVIATIONS = [  # the change, its reason, and what is left of it in a footnote for many results
    (
        {"is_fid": False, "extractor": "digits_cnn64"},
        "the features are those of digits_cnn64, not of the verified Inception",
        None,
    ),
    (
        {"n_generated": 5_000},
        "5 000 generated images instead of 50 000",
        "another number of generated images than 50 000",
    ),
    (
        {"n_generated": 50_001},
        "50 001 generated images instead of 50 000",
        "another number of generated images than 50 000",
    ),
    ({"n_generated": None}, "the number of generated images is not known", None),
    (
        {"seeds": 3},
        "the mean over 3 sampling seeds, published numbers are of one",
        "the mean over several sampling seeds, published numbers are of one",
    ),
    ({"image_shape": None}, "the size of the generated images is not known", None),
    (
        {"image_shape": (3, 64, 64), "reference_side": 64},
        "images of 64×64 pixels instead of 256×256 or 512×512",
        "images of another size than 256×256 or 512×512",
    ),
    (
        {"image_shape": (3, 256, 512)},
        "images of 256×512 pixels instead of 256×256 or 512×512",
        "images of another size than 256×256 or 512×512",
    ),
    (
        {"reference_side": 512},
        "images of 256×256 pixels against a reference of 512×512",
        "images of another size than the reference's",
    ),
    ({"image_shape": (1, 256, 256)}, "images of 1 channel instead of 3", None),
    ({"altered": ["resized to 256"]}, "the images were altered: resized to 256", None),
    (
        {"changed_metrics": ["precision_recall with k=5"]},
        "computed otherwise than published numbers: precision_recall with k=5",
        None,
    ),
    ({"reference_statistics": False}, "the reference's statistics were computed here, not published with it", None),
    (
        {"reference_count": 10_000},
        "the reference's statistics are of 10 000 images",
        "the reference's statistics are of too few images",
    ),
    (
        {"reference_images": 0, "reference_side": None},
        "the reference holds no images that would tell its resolution",
        None,
    ),
    (
        {"reference_images": 9_000},
        "precision and recall against 9 000 reference images instead of 10 000",
        "precision and recall against another number of reference images than 10 000",
    ),
    (
        {"labels": "balanced"},
        "as many images of each class; published baselines draw the classes at random",
        None,
    ),
    (
        {"labels": "data"},
        "labels as frequent as in the training data; published baselines draw the classes at random",
        None,
    ),
    ({"labels": "listed"}, "labels of listed classes; published baselines draw the classes at random", None),
    (
        {"weights": "model"},
        "sampled with the weights as they are, published baselines with their moving average (EMA)",
        None,
    ),
    ({"precision": "bf16"}, "sampled in bf16 instead of fp32", None),
    (
        {"dial": "target=1.5"},
        "sampled with target=1.5 instead of as trained",
        "sampled with another number of active experts than as trained",
    ),
    (
        {"dial": "p=[0.3, 0.9] by time"},
        "sampled with p=[0.3, 0.9] by time instead of as trained",
        "sampled with another number of active experts than as trained",
    ),
]


@pytest.mark.parametrize(("change", "reason", "general"), DEVIATIONS, ids=lambda each: json.dumps(each)[:40])
def test_each_deviation_is_a_reason_of_its_own(change, reason, general):
    assert not_comparable(replace(BY_THE_BOOK, **change)) == [reason]
    assert in_general(reason) == (general or reason)


def test_all_reasons_are_listed_and_each_change_to_the_images_is_one():
    everything = {"is_fid": False, "n_generated": 100, "seeds": 2, "image_shape": (1, 8, 8), "reference_side": 16}
    settings = {"altered": ["resized to 8", "grey"], "changed_metrics": ["a", "b"], "labels": "data", "dial": "p=0.9"}
    reference = {"reference_statistics": False, "reference_count": 9, "reference_images": 9}
    changed = everything | settings | reference | {"weights": "model", "precision": "bf16"}
    reasons = not_comparable(replace(BY_THE_BOOK, **changed))
    assert len(reasons) == len(set(reasons)) == 6 + 4 + 3 + 4


def test_statistics_against_statistics_give_no_impossible_reason():
    bare = {"n_generated": None, "image_shape": None, "reference_images": 0, "reference_side": None}
    reasons = not_comparable(replace(BY_THE_BOOK, **bare))
    assert len(reasons) == 3 and not any(character.isdigit() for reason in reasons for character in reason)
