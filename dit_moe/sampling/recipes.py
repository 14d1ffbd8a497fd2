"""How published baselines were sampled, by name: recipes.yaml, checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dit_moe import config, yaml_text
from dit_moe.registry import did_you_mean


@dataclass(frozen=True, kw_only=True)
class SamplingRecipe:
    """How a published baseline was sampled: all of the section ``sample`` that its source states.

    What it does not state (seed, batch size, precision) stays the run's own.
    """

    name: str
    summary: str  # one line, with the source
    objective: str  # that the network must have been trained with
    sample: config.Tree

    @property
    def overrides(self) -> tuple[str, ...]:
        """``key=value`` for the section ``sample``."""
        return tuple(f"{key}={json.dumps(value)}" for key, value in self.sample.items())

    def label(self, overrides: Sequence[str]) -> str:
        """What a result made with it and with further overrides is called: it names the settings that these change.

        The name of the section ``sample`` may stand before them.
        """
        own, further = config.override({}, self.overrides), [each.removeprefix("sample.") for each in overrides]
        before, after = config.flatten(own), config.flatten(config.override(own, further))
        changed = [key for key in before if key not in after or after[key] != before[key]]
        return f"{self.name}, changed: {', '.join(changed)}" if changed else self.name


def sampling_recipe(name: str, objective: str, option: str = "--recipe") -> SamplingRecipe:
    """The recipe `name`, given by the command's `option`, for a network trained with `objective`.

    ValueError if there is none, or if it is for another objective.
    """
    if name not in SAMPLING:
        raise ValueError(f"{option} {name} is not known; {did_you_mean(name, SAMPLING)}")
    recipe = SAMPLING[name]
    if recipe.objective != objective:
        needs = f"samples networks trained with {recipe.objective}, this run was trained with {objective}"
        fitting = [each.name for each in SAMPLING.values() if each.objective == objective]
        raise ValueError(f"{option} {name} {needs}; choose one of {', '.join(fitting) or 'none, by leaving it out'}")
    return recipe


_RECIPES = yaml_text.read(Path(__file__).with_name("recipes.yaml").read_text(encoding="utf-8"))
SAMPLING = {
    name: SamplingRecipe(name=name, **{**recipe, "sample": recipe["sample"] | _RECIPES["all_sampling"]})
    for name, recipe in _RECIPES["sampling"].items()
}
