"""The search of a study: options of training that are chosen for each variant by itself, on a seed that is left out.

A comparison in which one side was tuned is worth nothing. So every variant is trained as its config says, and then with
each alternative of one option after the other; what has the lowest held-out loss is kept. Every round is a study of its
own, in a folder below the whole one's.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

from dit_moe import config, yaml_text
from dit_moe.config import ConfigError, Tree
from dit_moe.files import write_atomically
from dit_moe.json_files import read_if_good
from dit_moe.studies.study import Study, Variant, experiments_of

FOLDER, FILE = "search", "search.json"  # in the folder of the study
DIVERGED = float("inf")  # the loss of a run that was stopped by numbers that were not finite


@dataclass(frozen=True)
class Tried:
    """A way to train a variant, and what came of it."""

    changes: tuple[str, ...]  # to what the study says
    loss: float  # held-out


class Search:
    """The rounds of a study's search, one after the other: run what `next_study` gives, and `take` its losses.

    Args:
        study: with a search, and configs that are found from anywhere, as the files of its rounds are elsewhere.
        folder: of its file.
        names: of the variants to search for; None: all.
    """

    def __init__(self, study: Study, folder: Path, names: Collection[str] | None = None) -> None:
        assert study.search is not None
        self.study, self.settings = study, study.search
        self.variants = [variant for variant in study.variants if names is None or variant.name in names]
        self.tried: dict[str, list[Tried]] = {variant.name: [] for variant in self.variants}
        self.round = 0  # the first is of the variants as they are
        self._trying: dict[str, tuple[str, tuple[str, ...]]] = {}  # by name in the round: variant, changes
        self._experiments = experiments_of(study, folder, self.variants)

    @property
    def name(self) -> str:
        """Of the round, and its folder."""
        return "as_it_is" if self.round == 0 else f"{self.round}-{_key(self.settings.rounds[self.round - 1][0])}"

    def next_study(self) -> Study | None:
        """That of the next round; None after the last.

        Variants without the option, or that set it, take no part, nor is tried what is so already.
        """
        while self.round <= len(self.settings.rounds):
            alternatives = self.settings.rounds[self.round - 1] if self.round else (None,)
            self._trying, variants = {}, []
            for variant in self.variants:
                for number, change in enumerate(alternatives):
                    if change is not None and not self._takes(variant, change):
                        continue
                    changes = (*self.best(variant.name).changes, change) if change is not None else ()
                    name = variant.name if change is None else f"{variant.name}-{number}"
                    self._trying[name] = variant.name, changes
                    variants.append(self._variant(variant, name, changes))
            if variants:
                return self._study(variants)
            self.round += 1
        return None

    def take(self, losses: Mapping[str, float]) -> None:
        """The held-out losses of the round by the names of its variants; the next one begins."""
        for name, (variant, changes) in self._trying.items():
            self.tried[variant].append(Tried(changes, losses[name]))
        self.round += 1

    def best(self, variant: str) -> Tried:
        """The one with the lowest loss so far; of equal ones the first."""
        return min(self.tried[variant], key=lambda tried: tried.loss)

    def _takes(self, variant: Variant, change: str) -> bool:
        """Whether a variant has an option, as a dense one has none of a router's, leaves it open, and has another."""
        part, key = self._experiments[variant.name], _key(change)
        for name in key.split("."):
            if not hasattr(part, name) or name in getattr(part, "UNUSED", ()):
                return False
            part = getattr(part, name)
        said = yaml_text.read(change.partition("=")[2])
        return part != said and key not in map(_key, variant.changes)

    def _variant(self, variant: Variant, name: str, changes: tuple[str, ...]) -> Variant:
        label = " ".join([variant.label or variant.name, *changes])
        return Variant(
            name=name, label=label, config=variant.config, changes=(*variant.changes, *changes), baseline=name
        )

    def _study(self, variants: list[Variant]) -> Study:
        shorter = () if self.settings.steps is None else (f"train.steps={self.settings.steps}",)
        return replace(
            self.study,
            title=f"{self.study.title}: search, {self.name}",
            changes=(*self.study.changes, *shorter),
            variants=tuple(variants),
            baseline=variants[0].name,
            seeds=(self.settings.seed,),
            metric=None,
            timing_steps=0,
            search=None,
        )

    def result(self) -> dict[str, Found]:
        """By variant: the choice, and all that was tried, in order."""
        return {
            variant.name: {
                **_of_variant(variant),
                "chosen": list(self.best(variant.name).changes),
                "tried": [
                    {"changes": list(each.changes), "loss": each.loss if each.loss < DIVERGED else None}
                    for each in self.tried[variant.name]
                ],
            }
            for variant in self.variants
        }


class _Tried(TypedDict):
    changes: list[str]
    loss: float | None  # None: it diverged


class Found(TypedDict):
    """What was chosen for a variant, and what that depends on beside the study."""

    config: str | None
    changes: list[str]
    chosen: list[str]
    tried: list[_Tried]


class SearchResult(TypedDict):
    """What search.json holds."""

    study: Tree  # what the choices of all variants depend on
    variants: dict[str, Found]


def _of_variant(variant: Variant) -> Found:
    return {"config": variant.config, "changes": list(variant.changes), "chosen": [], "tried": []}


def _of_study(study: Study) -> Tree:
    tree = config.dump(study)
    return {key: tree[key] for key in ("search", "config", "changes", "heldout")}


def read_search(study: Study, out: Path) -> dict[str, Found]:
    """What search.json in the folder `out` says of the study's variants; nothing of those that it is not done for."""
    kept = read_if_good(out / FILE, SearchResult)
    if kept is None or kept["study"] != _of_study(study):
        return {}
    known = {variant.name: _of_variant(variant) for variant in study.variants}
    return {
        name: found
        for name, found in kept["variants"].items()
        if name in known and all(found[key] == known[name][key] for key in ("config", "changes"))
    }


def keep_search(study: Study, out: Path, found: Mapping[str, Found]) -> None:
    """Write search.json with what was found, beside what it says of other variants."""
    kept = SearchResult(study=_of_study(study), variants={**read_search(study, out), **found})
    write_atomically(out / FILE, json.dumps(kept, indent=1, allow_nan=False) + "\n")


def tuned(study: Study, out: Path, needed: Collection[str]) -> Study:
    """The study with what its search chose for each variant; variants that it is not done for as they are.

    ConfigError if those are among the `needed`, or all of them.
    """
    if study.search is None:
        return study
    found = read_search(study, out)
    open_ = [name for name in needed if name not in found]
    if open_ or not found:
        of = f" for {', '.join(open_)}" if found else ""
        problem = f" is not done in {out}{of}, and decides how the variants are trained"
        raise ConfigError("search", f"{problem}; run the study without --only and --report, or set search=null")
    return replace(
        study,
        variants=tuple(
            replace(variant, changes=(*variant.changes, *found[variant.name]["chosen"]))
            if variant.name in found
            else variant
            for variant in study.variants
        ),
    )


def _key(change: str) -> str:
    return change.partition("=")[0].strip()
