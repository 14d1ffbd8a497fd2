"""Checkpoints of REPA through the import: SiT's network, whose time runs to the noise, beside projections."""

import argparse
from dataclasses import replace

import pytest
import torch

from dit_moe import checkpoint
from dit_moe.config import ConfigError, build
from dit_moe.diffusion import OBJECTIVES, SAMPLERS
from dit_moe.diffusion.samplers.flow import EulerConfig, EulerMaruyamaConfig
from dit_moe.experiments.image import Experiment
from dit_moe.formats import in_format, recognise
from dit_moe.models import MODELS
from dit_moe.sampling.recipes import SAMPLING
from tests.formats.lightningdit import Shape, forward, random_weights

PLAIN = Shape(patch=2, size=8, channels=4, swiglu=False, rope=False, rms_norm=False)
NORMED = replace(PLAIN, qk_norm=True)
HEADS = "model.heads=4"


def saved(path, shape, bare=False, **arguments):
    """A checkpoint as its training script writes it, or published weights."""
    random, width = torch.Generator().manual_seed(9), shape.width
    sizes = {0: (32, width), 2: (32, 32), 4: (24, 32)}
    projector = {f"projectors.0.{layer}.weight": torch.randn(size, generator=random) for layer, size in sizes.items()}
    projector |= {f"projectors.0.{layer}.bias": torch.randn(size[0], generator=random) for layer, size in sizes.items()}
    weights = random_weights(shape) | projector
    args = argparse.Namespace(model="SiT-XL/2", encoder_depth=8, proj_coeff=0.5, **arguments)
    torch.save(weights if bare else {"model": weights, "ema": weights, "opt": {}, "args": args, "steps": 4}, path)
    return path


def opened(path, *overrides):
    """The config, and the model with the weights."""
    weights = recognise(path, "auto", overrides)
    experiment = build(Experiment, weights.config())
    model = MODELS.build(experiment.model).eval()
    checkpoint.load_into(model, weights.weights("ema"), path)
    return weights, experiment, model


@pytest.mark.parametrize(("shape", "words"), [(PLAIN, [HEADS]), (NORMED, [])], ids=["plain", "norms tell the heads"])
@pytest.mark.parametrize("bare", [False, True])
def test_an_imported_model_gives_the_original_s_output(tmp_path, shape, words, bare):
    _, _, model = opened(saved(tmp_path / "repa.pt", shape, bare), *words)
    x, t_B = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.0, 0.3, 1.0])
    with torch.no_grad():
        out = model(x, t_B, torch.tensor([0, 3, 7]))
    expected = forward(shape, random_weights(shape), x, t_B, torch.tensor([0, 3, 7]))
    assert (out - expected).abs().max() / expected.abs().max() <= 1e-5


def test_euler_s_method_from_noise_at_1_to_data_at_0_gives_the_original_s_samples(tmp_path):
    _, experiment, model = opened(saved(tmp_path / "repa.pt", NORMED))
    assert isinstance(experiment.sample.sampler, EulerMaruyamaConfig)
    assert experiment.sample.guidance == build(type(experiment.sample), SAMPLING["repa"].sample).guidance
    noise, labels_B = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([1, 4])
    flow = OBJECTIVES.build(experiment.objective, num_classes=7)
    with torch.no_grad():
        found = SAMPLERS.build(EulerConfig(steps=5), flow)(
            model, noise, labels_B, [torch.Generator()] * 2, experiment.sample.guidance
        )
    x, null_B = noise, torch.tensor([7, 7])
    for t, after in [(1.0, 0.8), (0.8, 0.6), (0.6, 0.4), (0.4, 0.2), (0.2, 0.0)]:
        velocity = forward(NORMED, random_weights(NORMED), x, torch.tensor([t, t]), labels_B)
        if t <= 0.7:
            null = forward(NORMED, random_weights(NORMED), x, torch.tensor([t, t]), null_B)
            velocity = null + 1.8 * (velocity - null)
        x = x + (after - t) * velocity
    assert (found - x).abs().max() / x.abs().max() <= 1e-5


def test_the_path_is_the_checkpoint_s_and_another_is_refused(tmp_path):
    assert opened(saved(tmp_path / "gvp.pt", NORMED, path_type="cosine"))[1].objective.path == "gvp"
    with pytest.raises(ValueError, match="repa: it was trained on the path edm"):
        opened(saved(tmp_path / "edm.pt", NORMED, path_type="edm"))


def test_weights_without_projectors_are_not_written_as_repa_s(tmp_path):
    weights, _, _ = opened(saved(tmp_path / "repa.pt", NORMED))
    with pytest.raises(ConfigError, match=r"--to repa: .* there are no projectors"):
        in_format("repa", weights, "ema")
