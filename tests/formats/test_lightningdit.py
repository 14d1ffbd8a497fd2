"""Checkpoints of LightningDiT through the import, against a forward pass of its own."""

from dataclasses import replace

import pytest
import torch

from dit_moe import checkpoint
from dit_moe.config import ConfigError, build
from dit_moe.diffusion import OBJECTIVES, SAMPLERS, GuidanceConfig
from dit_moe.diffusion.samplers.flow import EulerConfig
from dit_moe.experiments.image import Experiment
from dit_moe.formats import in_format, recognise
from dit_moe.formats.base import named_size
from dit_moe.formats.lightningdit import ROTARY
from dit_moe.models import MODELS
from dit_moe.sampling.recipes import SAMPLING
from tests.cli.conftest import cli
from tests.formats.lightningdit import Shape, forward, guided_samples, random_weights

PUBLISHED = Shape()  # but for its size
SHAPES = {
    "published": PUBLISHED,
    "all options": Shape(patch=2, size=8, qk_norm=True, learn_sigma=True),
    "without RMS norms": Shape(rms_norm=False, qk_norm=True, swiglu=False),
}
WITHOUT_ROTARY = Shape(rope=False)


def saved(path, shape, **changes):
    """A checkpoint as its training script writes it, with other raw weights than averaged ones."""
    ema = random_weights(shape) | changes
    config = {"transport": {"path_type": "Linear", "prediction": "velocity", "use_lognorm": False}}
    torch.save({"model": {name: each + 1 for name, each in ema.items()}, "ema": ema, "opt": {}, "config": config}, path)
    return path


def opened(path, *overrides):
    """The weights, their config, and the model with them."""
    weights = recognise(path, "auto", overrides)
    experiment = build(Experiment, weights.config())
    model = MODELS.build(experiment.model).eval()
    checkpoint.load_into(model, weights.weights("ema"), path)
    return weights, experiment, model


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_an_imported_model_gives_the_original_s_output(tmp_path, shape):
    _, _, model = opened(saved(tmp_path / "light.pt", shape))
    generator = torch.Generator().manual_seed(1)
    x, t_B = torch.randn(3, shape.channels, shape.size, shape.size, generator=generator), torch.tensor([0.0, 0.3, 1.0])
    with torch.no_grad():
        out = model(x, t_B, torch.tensor([0, 3, 7]))[:, : shape.channels]
    expected = forward(shape, random_weights(shape), x, t_B, torch.tensor([0, 3, 7]))
    assert (out - expected).abs().max() / expected.abs().max() <= 1e-5  # measured 1.2e-6


def test_settings_of_another_suite_are_not_taken_for_a_fault_of_the_program(tmp_path):
    path = tmp_path / "light.pt"
    torch.save({"ema": random_weights(PUBLISHED), "config": {"transport": "linear"}}, path)
    with pytest.raises(ValueError, match="lightningdit: the settings beside the weights are not as the suite writes"):
        recognise(path)


def test_heads_are_asked_for_where_nothing_tells_them(tmp_path):
    path = saved(tmp_path / "light.pt", WITHOUT_ROTARY)
    with pytest.raises(ValueError, match="heads"):
        opened(path)
    assert opened(path, "model.heads=4")[1].model.position_embedding == "absolute"


def test_round_trips_to_the_original_s_names_are_exact(tmp_path):
    for number, shape in enumerate(SHAPES.values()):
        weights, _, _ = opened(saved(tmp_path / f"{number}.pt", shape))
        back, original = in_format("lightningdit", weights, "ema"), random_weights(shape)
        assert back.keys() == original.keys()
        for name, tensor in original.items():
            near = 1e-6 if name in ROTARY else 0  # they are computed
            torch.testing.assert_close(back[name], tensor, rtol=0, atol=near, msg=name)


@pytest.mark.parametrize("name", ["dit", "sit"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_no_network_without_its_options_is_given_its_weights(tmp_path, name, shape):
    weights, _, _ = opened(saved(tmp_path / "light.pt", shape))
    with pytest.raises(ConfigError, match="export it as a run"):
        in_format(name, weights, "ema")


def test_the_published_shapes_have_our_names():
    for depth, width, hidden, heads, name in [(28, 1152, 3072, 16, "DiT-XL/1"), (24, 1024, 2730, 16, "DiT-L/1")]:
        assert named_size(depth, width, hidden, 1, heads, "swiglu") == {"name": name}
        assert MODELS.config_class(name)(name=name, activation="swiglu").mlp_hidden == hidden


def test_euler_s_method_with_the_recipe_s_guidance_gives_the_original_s_samples(tmp_path):
    """Its time ends at the data, is shifted by 0.3, and is guided from 0.125 on."""
    _, experiment, model = opened(saved(tmp_path / "light.pt", PUBLISHED))
    sample = build(type(experiment.sample), SAMPLING["lightningdit-cfg6.7"].sample)
    assert (experiment.sample.sampler, experiment.sample.guidance) == (sample.sampler, sample.guidance)
    flow = OBJECTIVES.build(experiment.objective, num_classes=PUBLISHED.classes)
    noise, labels_B = torch.randn(2, 5, 6, 6, generator=torch.Generator().manual_seed(2)), torch.tensor([1, 4])
    sampler = SAMPLERS.build(replace(sample.sampler, steps=6), flow)
    assert isinstance(sample.sampler, EulerConfig) and isinstance(sample.guidance, GuidanceConfig)
    guidance = replace(sample.guidance, scale=1.5)  # random weights overflow at more
    with torch.no_grad():
        found = sampler(model, noise, labels_B, [torch.Generator()] * 2, guidance)
    expected = guided_samples(PUBLISHED, random_weights(PUBLISHED), noise, labels_B, times=7, scale=1.5)
    assert (found - expected).abs().max() / expected.abs().max() <= 1e-5


def test_the_objective_is_the_checkpoint_s_or_the_published_one(tmp_path):
    trained = opened(saved(tmp_path / "trained.pt", PUBLISHED))[1].objective
    torch.save(random_weights(PUBLISHED), tmp_path / "bare.pt")
    published = opened(tmp_path / "bare.pt")[1].objective
    assert (trained.time, published.time) == ("uniform", "logit_normal")
    assert {each.cosine_weight for each in (trained, published)} == {1.0}
    assert {each.direction for each in (trained, published)} == {"to_data"}


def test_the_imported_run_samples_in_the_latent_space_of_the_statistics_that_are_given(tmp_path):
    shape, stats = replace(PUBLISHED, channels=4, size=4), tmp_path / "latents_stats.pt"
    torch.save({"mean": torch.full((1, 4, 1, 1), 0.5), "std": torch.full((1, 4, 1, 1), 2.0)}, stats)
    source, run = saved(tmp_path / "light.pt", shape), tmp_path / "run"
    words = ["first_stage.model=digits", f"first_stage.statistics={stats}"]
    assert cli("import", source, "--out", run, *words) == 0
    stats.unlink()
    first_stage = checkpoint.open_checkpoint(run).config()["first_stage"]
    assert (first_stage["shift"], first_stage["scale"]) == ([0.5] * 4, [0.5] * 4)
    assert cli("sample", run, "count=2", "sampler.steps=2", "--out", tmp_path / "out") == 0


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"blocks.0.adaLN_modulation.1.weight": torch.zeros(192, 48)}, r"modulation has no shift \(wo_shift\)"),
        ({"feat_rope.freqs_cos": torch.zeros(25, 12)}, r"feat_rope.freqs_cos is \[25, 12\], and \[36, 12\]"),
        ({"mystery": torch.zeros(1)}, "1 unexpected: mystery"),
    ],
)
def test_what_is_of_another_model_is_refused_with_the_reason(tmp_path, changes, problem):
    with pytest.raises(ValueError, match=rf"lightningdit: .*{problem}"):
        recognise(saved(tmp_path / "light.pt", PUBLISHED, **changes))


def test_tables_of_other_angles_are_refused(tmp_path):
    turned = {name: random_weights(PUBLISHED)[name].roll(1, 0) for name in ROTARY}
    weights = recognise(saved(tmp_path / "light.pt", PUBLISHED, **turned))
    with pytest.raises(ValueError, match=r"feat_rope.freqs_cos differs by .* from the table of positions that count"):
        weights.weights("ema")
