"""The extractor that a command names, in the words that a config may have for one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from dit_moe import config
from dit_moe.config import ConfigError
from dit_moe.extractors.base import EXTRACTORS, OWN
from dit_moe.extractors.function import FunctionConfig, require_asked
from dit_moe.yaml_text import read_section

EXAMPLE = "--extractor '{name: inception, weights: FILE}'"


@dataclass(frozen=True)
class _Section:
    extractor: Annotated[Any, EXTRACTORS]


def chosen_extractor(text: str | None, default: Any) -> Any:
    """The config that ``--extractor text`` means: what ``eval.extractor`` may be. None means `default`.

    Raises ValueError for anything else, and if `default` is a function, which is only run where the command names it.
    """
    if text is None:
        require_asked(default)
        return default
    text = text.strip()
    try:
        section = read_section(text, EXAMPLE) if text.startswith("{") else text
        chosen = config.build(_Section, {"extractor": section}).extractor
    except ConfigError as error:
        told = str(error).removeprefix("extractor.").removeprefix(f"name={text}: ")
        raise ValueError(f"--extractor {text}: {told}, or {OWN}") from None
    of_default = isinstance(default, FunctionConfig) and chosen == FunctionConfig(path=default.path)
    return default if of_default else chosen
