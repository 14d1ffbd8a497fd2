"""What every config of an objective, a sampler or guidance promises."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from dit_moe.config import ConfigError, build, dump
from dit_moe.diffusion import OBJECTIVES, SAMPLERS, GuidanceConfig
from dit_moe.diffusion.samplers.flow import EulerConfig

NAMED = [(registry, name) for registry in (OBJECTIVES, SAMPLERS) for name in registry.names()]
CONFIGS = [GuidanceConfig, *(registry.config_class(name) for registry, name in NAMED)]
NUMBERS = [
    (config, field)
    for config in CONFIGS
    for field, hint in typing.get_type_hints(config).items()
    if float in (hint, *typing.get_args(hint)) and typing.get_origin(hint) is not tuple
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_reads_back_as_it_was_written(config: type) -> None:
    assert build(config, dump(config())) == config()


@pytest.mark.parametrize("name", SAMPLERS.names())
def test_a_sampler_says_which_objective_it_is_for_and_that_is_no_option(name: str) -> None:
    config_class = SAMPLERS.config_class(name)
    trained = OBJECTIVES.build(OBJECTIVES.config_class(config_class.objective)(), num_classes=5)
    assert SAMPLERS.build(config_class(steps=6), trained).trained.name == config_class.objective
    assert "objective" not in {field.name for field in dataclasses.fields(config_class)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("config", "field"), NUMBERS)
def test_an_option_that_is_not_finite_is_refused(config: type, field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}={value} "):
        config(**{field: value})


def construct(name: str, options: dict) -> None:
    """Guidance, an objective, or a "sampler …" of its objective."""
    if name == "guidance":
        GuidanceConfig(**options)
    elif name.startswith("sampler "):
        config = SAMPLERS.config_class(name.removeprefix("sampler "))(**options)
        SAMPLERS.build(config, OBJECTIVES.build(OBJECTIVES.config_class(config.objective)(), num_classes=5))
    else:
        OBJECTIVES.config_class(name)(**options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddpm", {"timesteps": 1}, "timesteps=1 must be at least 2"),
        ("ddpm", {"timesteps": 20}, "timesteps=20 is too few for schedule=linear.*schedule=cosine"),
        ("ddpm", {"min_snr_gamma": 0.0}, "min_snr_gamma=0.0 must be positive"),
        ("ddpm", {"label_dropout": 1.5}, r"label_dropout=1.5 must lie in \[0, 1\]"),
        ("flow", {"label_dropout": 1.5}, r"label_dropout=1.5 must lie in \[0, 1\]"),
        ("flow", {"time_std": 0.0}, "time_std=0.0 must be positive"),
        ("flow", {"time_shift": -1.0}, "time_shift=-1.0 must be positive"),
        ("flow", {"base_dims": 0}, "base_dims=0 must be positive"),
        ("flow", {"time_scale": 0.0}, "time_scale=0.0 must be positive"),
        ("flow", {"cosine_weight": -0.1}, "cosine_weight=-0.1 must be finite, not negative"),
        ("sampler ddpm", {"steps": 1}, "steps=1 must be at least 2"),
        ("sampler ddpm", {"steps": 1001}, "steps=1001 does not fit: the schedule has 1000 levels"),
        ("sampler dpm++", {"steps": 1000}, "steps=1000 does not fit: .* take between 2 and 999"),
        ("sampler ddim", {"eta": 1.1}, r"eta=1.1 must lie in \[0, 1\]"),
        ("sampler euler", {"steps": 0}, "steps=0 must be at least 1"),
        ("sampler euler", {"time_shift": 0.0}, "time_shift=0.0 must be positive"),
        ("sampler euler_maruyama", {"last_step": 1.0}, "last_step=1.0 must lie between 0 and 1"),
        ("sampler euler_maruyama", {"diffusion_scale": -1.0}, "diffusion_scale=-1.0 must be finite, not negative"),
        ("guidance", {"scale": -1.0}, "scale=-1.0 must be a finite number"),
        ("guidance", {"interval": (0.6, 0.2)}, r"interval=\(0.6, 0.2\) must be two times"),
        ("guidance", {"interval": (0.0, 1.5)}, r"interval=\(0.0, 1.5\) must be two times"),
        ("guidance", {"interval": (0.0, float("nan"))}, r"interval=\(0.0, nan\) must be two times"),
        ("guidance", {"interval": (0.0,)}, r"interval=\(0.0,\) must be two times"),
        ("guidance", {"channels": 0}, "channels=0 must be at least 1"),
    ],
)
def test_a_bad_option_is_refused_with_what_is_wanted(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        construct(name, options)


def test_a_time_shift_is_a_factor_or_as_trained() -> None:
    for shift in ("as_trained", 2.0):
        assert build(EulerConfig, {"time_shift": shift}).time_shift == shift
    with pytest.raises(ConfigError, match="time_shift=never must be a number, or as_trained"):
        build(EulerConfig, {"time_shift": "never"})
