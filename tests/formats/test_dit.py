"""Checkpoints of DiT and SiT through the import."""

import pytest
import torch

from dit_moe import checkpoint
from dit_moe.config import build
from dit_moe.diffusion import FlowConfig
from dit_moe.experiments.image import Experiment
from dit_moe.experiments.run import open_image_run
from dit_moe.formats import recognise
from dit_moe.formats.dit import DiTFormat
from dit_moe.formats.rules import to_theirs
from dit_moe.sampling.recipes import SAMPLING
from tests.cli.conftest import cli
from tests.formats.files import BUNDLED, HEADS, bare, golden, of_training, weights_of


def relative_error(found, expected):
    return (found - expected).abs().max() / expected.abs().max()


@pytest.fixture(scope="module", params=["dit", "sit"])
def imported(request, tmp_path_factory):
    """The name of a golden network, and its run folder by `dit-moe import` of the training script's checkpoint."""
    folder = tmp_path_factory.mktemp("imported")
    source = of_training(folder / "0400000.pt", request.param)
    assert cli("import", source, "--out", folder / "run", HEADS, *BUNDLED) == 0
    return request.param, folder / "run"


def test_the_imported_run_gives_the_original_s_output(imported):
    name, folder = imported
    numbers = golden(name)
    with torch.no_grad():
        out = open_image_run(folder).model(*(numbers[key] for key in "xty"))
    expected = numbers["out"]
    assert relative_error(out[:, : expected.shape[1]], expected) <= 1e-5  # measured 0 (dit) and 3e-8 (sit)


def test_the_imported_run_has_the_suite_s_objective_recipe_and_latent_space(imported):
    name, folder = imported
    experiment = build(Experiment, checkpoint.open_checkpoint(folder).config())
    recipe = SAMPLING[{"dit": "dit-cfg1.5", "sit": "sit-ode-cfg1.5"}[name]]
    assert recipe.objective == experiment.objective.__class__.__name__.removesuffix("Config").lower()
    assert experiment.sample.guidance.channels == 3 and experiment.sample.guidance.scale == 1.5
    weights = recognise(folder.parent / "0400000.pt", "auto", [HEADS])
    assert build(Experiment, weights.config()).first_stage.scale == (0.18215,)


def test_round_trips_to_the_original_s_names_are_exact(tmp_path):
    weights = recognise(bare(tmp_path / "dit.pt", "dit"), "dit", [HEADS])
    back = to_theirs(DiTFormat().rules(None), weights.weights("ema"))
    original = weights_of("dit")
    assert back.keys() == original.keys() and all(torch.equal(back[key], original[key]) for key in original)


@pytest.mark.parametrize("path", ["Linear", "GVP"])
def test_sit_s_time_ends_at_the_data(tmp_path, path):
    """With these options our flow has SiT's losses and samples: tests/diffusion/test_reference.py."""
    weights = recognise(of_training(tmp_path / "sit.pt", "sit", path_type=path), "auto", [HEADS])
    objective = build(Experiment, weights.config()).objective
    assert objective == FlowConfig(path=path.lower(), time_scale=1.0, direction="to_data")


@pytest.mark.parametrize(("key", "value"), [("path_type", "VP"), ("prediction", "score")])
def test_a_sit_that_our_objective_cannot_follow_is_refused_with_the_reason(tmp_path, key, value):
    source = of_training(tmp_path / "sit.pt", "sit", **{key: value})
    with pytest.raises(ValueError, match=f"sit: it .* {value}"):
        recognise(source, "sit", [HEADS])


@pytest.mark.parametrize(
    ("file", "name"), [("DiT-XL-2-256x256.pt", "dit"), ("SiT-XL-2-256.pt", "sit"), ("SiT-XL-2-256x256.pt", "sit")]
)
def test_a_bare_file_under_the_name_that_its_suite_published_is_recognised_and_it_is_said(tmp_path, capsys, file, name):
    weights = recognise(bare(tmp_path / file, name), "auto", [HEADS])
    assert weights.state["imported"]["format"] == name
    assert f"{file} is taken for weights of {weights.format.suite}, which are published" in capsys.readouterr().err
    assert recognise(tmp_path / file, "promoe", [HEADS]).state["imported"]["format"] == "promoe"  # who says it is asked
