"""What every config of an objective or a sampler promises."""

from __future__ import annotations

import typing

import pytest

from dit_moe.config import ConfigError
from dit_moe.diffusion import OBJECTIVES, SAMPLERS, GuidanceConfig

CONFIGS = [registry.config_class(name) for registry in (OBJECTIVES, SAMPLERS) for name in registry.names()]
NUMBERS = [
    (config, field)
    for config in (GuidanceConfig, *CONFIGS)
    for field, hint in typing.get_type_hints(config).items()
    if float in (hint, *typing.get_args(hint)) and typing.get_origin(hint) is not tuple
]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("config", "field"), NUMBERS)
def test_an_option_that_is_not_finite_is_refused(config: type, field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}={value} "):
        config(**{field: value})
