"""The search of a study: options of training that are chosen for each variant by itself, on a seed that is left out.

A comparison in which one side was tuned is worth nothing. So every variant is trained as its config says, and then with
each alternative of one option after the other; what has the lowest held-out loss is kept. Options that help only
together are missed so. The baseline's search therefore comes first, and the others begin with the better of their
config and what was chosen for the baseline. Variants with `options_of` take what was chosen for another, and have no
search of their own. Every round is a study of its own, in a folder below the whole one's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

from dit_moe import config, yaml_text
from dit_moe.config import ConfigError, Tree
from dit_moe.files import write_atomically
from dit_moe.json_files import read_if_good
from dit_moe.studies.study import Study, Variant, experiments_of
from dit_moe.tasks import AnyExperiment

FOLDER, FILE = "search", "search.json"  # in the folder of the study
DIVERGED = float("inf")  # the loss of a run that was stopped by numbers that were not finite


@dataclass(frozen=True)
class Tried:
    """A way to train a variant, and what came of it."""

    changes: tuple[str, ...]  # to what the study says
    loss: float  # held-out


@dataclass(frozen=True)
class _Round:
    """Ways to train some variants, all at once."""

    name: str  # of its folder
    variants: Sequence[Variant]
    alternatives: Sequence[str] | None = None  # of one option; None: as the variants are, or as the baseline chose


class Search:
    """The rounds of a study's search, one after the other: run what `next_study` gives, and `take` its losses.

    Args:
        study: with a search, and configs that are found from anywhere, as the files of its rounds are elsewhere.
        folder: of its file.
        names: of the variants to search for; None: all that have no `options_of`.
        start: what was chosen for the baseline, if it is not among them.
    """

    def __init__(
        self, study: Study, folder: Path, names: Collection[str] | None = None, start: Sequence[str] = ()
    ) -> None:
        assert study.search is not None
        self.study, self.settings = study, study.search
        if names is None:
            names = searched_for(study, [variant.name for variant in study.variants])
        self.variants = [variant for variant in study.variants if variant.name in names]
        self.tried: dict[str, list[Tried]] = {variant.name: [] for variant in self.variants}
        self._known_start = tuple(start)
        self._rounds, self._round = self._plan(), 0
        self._trying: dict[str, tuple[str, tuple[str, ...]]] = {}  # by name in the round: variant, changes
        self._experiments = experiments_of(study, folder, self.variants)

    def _plan(self) -> list[_Round]:
        baseline = [variant for variant in self.variants if variant.name == self.study.baseline]
        others = [variant for variant in self.variants if variant not in baseline]

        def options_for(variants: list[Variant]) -> list[_Round]:
            rounds = enumerate(self.settings.rounds, 1)
            return [_Round(f"{number}-{_key(each[0])}", variants, each) for number, each in rounds]

        begin, begin_as_baseline = _Round("as_it_is", self.variants), _Round(f"as_{self.study.baseline}", others)
        return [begin, *options_for(baseline), begin_as_baseline, *options_for(others)]

    @property
    def name(self) -> str:
        """Of the round, and its folder."""
        return self._rounds[self._round].name

    @property
    def start(self) -> tuple[str, ...]:
        """What was chosen for the baseline."""
        return self.best(self.study.baseline).changes if self.study.baseline in self.tried else self._known_start

    def next_study(self) -> Study | None:
        """That of the next round; None after the last.

        Variants without the option, or that set it, take no part, nor is tried what is so already.
        """
        while self._round < len(self._rounds):
            self._trying, variants = {}, []
            for variant in self._rounds[self._round].variants:
                for changes in self._ways(variant, self._rounds[self._round]):
                    if all(set(changes) != set(each.changes) for each in self.tried[variant.name]):
                        name = "+".join([variant.name, *sorted(map(_in_a_name, changes))])
                        self._trying[name] = variant.name, changes
                        variants.append(self._variant(variant, name, changes))
            if variants:
                return self._study(variants)
            self._round += 1
        return None

    def _ways(self, variant: Variant, round_: _Round) -> Iterator[tuple[str, ...]]:
        """The changes of each way to train the variant that a round is for."""
        experiment = self._experiments[variant.name]
        if round_ is self._rounds[0]:
            yield ()
        elif round_.alternatives is None:
            yield applying(self.start, variant, experiment)
        for change in applying(round_.alternatives or (), variant, experiment):
            yield *(each for each in self.best(variant.name).changes if _key(each) != _key(change)), change

    def take(self, losses: Mapping[str, float]) -> None:
        """The held-out losses of the round by the names of its variants; the next one begins."""
        for name, (variant, changes) in self._trying.items():
            self.tried[variant].append(Tried(changes, losses[name]))
        self._round += 1

    def best(self, variant: str) -> Tried:
        """The one with the lowest loss so far; of equal ones the first."""
        return min(self.tried[variant], key=lambda tried: tried.loss)

    def _variant(self, variant: Variant, name: str, changes: tuple[str, ...]) -> Variant:
        label = ", ".join([variant.label or variant.name, *map(_short, changes)])
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
                "start": [] if variant.name == self.study.baseline else list(self.start),
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
    start: list[str]  # what was chosen for the baseline, if it is another
    chosen: list[str]
    tried: list[_Tried]


class SearchResult(TypedDict):
    """What search.json holds."""

    study: Tree  # what the choices of all variants depend on
    variants: dict[str, Found]


def _of_variant(variant: Variant) -> Found:
    return {"config": variant.config, "changes": list(variant.changes), "start": [], "chosen": [], "tried": []}


def _of_study(study: Study) -> Tree:
    tree = config.dump(study)
    return {key: tree[key] for key in ("search", "config", "changes", "heldout")}


def read_search(study: Study, out: Path) -> dict[str, Found]:
    """What search.json in the folder `out` says of the study's variants; nothing of those that it is not done for."""
    kept = read_if_good(out / FILE, SearchResult)
    if kept is None or kept["study"] != _of_study(study):
        return {}
    known = {variant.name: _of_variant(variant) for variant in study.variants if variant.options_of is None}
    found = {
        name: each
        for name, each in kept["variants"].items()
        if name in known and all(each[key] == known[name][key] for key in ("config", "changes"))
    }
    start = found[study.baseline]["chosen"] if study.baseline in found else None
    return {name: each for name, each in found.items() if name == study.baseline or each["start"] == start}


def keep_search(study: Study, out: Path, found: Mapping[str, Found]) -> None:
    """Write search.json with what was found, beside what it says of other variants."""
    kept = SearchResult(study=_of_study(study), variants={**read_search(study, out), **found})
    write_atomically(out / FILE, json.dumps(kept, indent=1, allow_nan=False) + "\n")


def searched_for(study: Study, needed: Collection[str]) -> list[str]:
    """The variants whose search decides how those of the names `needed` are trained; the baseline is one of them."""
    sources = {study.variant(name).options_of or name for name in needed} | {study.baseline}
    return [variant.name for variant in study.variants if variant.name in sources]


def chosen_options(study: Study, folder: Path, out: Path) -> dict[str, tuple[str, ...]]:
    """By variant, the changes that were chosen for it, or for the one that its `options_of` names.

    Variants that the search is not done for are left out. `folder` is that of the study's file, `out` of its results.
    """
    found = read_search(study, out)
    experiments = experiments_of(study, folder)
    return {
        variant.name: applying(found[source]["chosen"], variant, experiments[variant.name])
        for variant in study.variants
        if (source := variant.options_of or variant.name) in found
    }


def tuned(study: Study, folder: Path, out: Path, needed: Collection[str]) -> Study:
    """The study with what its search chose for each variant; variants that it is not done for as they are.

    ConfigError if those are among the `needed`, or all of them.
    """
    if study.search is None:
        return study
    chosen = chosen_options(study, folder, out)
    open_ = [name for name in needed if name not in chosen]
    if open_ or not chosen:
        of = f" for {', '.join(open_)}" if chosen else ""
        problem = f" is not done in {out}{of}, and decides how the variants are trained"
        raise ConfigError("search", f"{problem}; run the study without --only and --report, or set search=null")
    variants = (replace(each, changes=(*each.changes, *chosen.get(each.name, ()))) for each in study.variants)
    return replace(study, variants=tuple(variants))


def applying(changes: Iterable[str], variant: Variant, experiment: AnyExperiment) -> tuple[str, ...]:
    """Those of the changes that a variant can take: it has the option, leaves it open, and has another value.

    A dense one has no option of a router's. The experiment is the variant's, as it is.
    """
    return tuple(change for change in changes if _applies(change, variant, experiment))


def _applies(change: str, variant: Variant, experiment: AnyExperiment) -> bool:
    part, key = experiment, _key(change)
    for name in key.split("."):
        if not hasattr(part, name) or name in getattr(part, "UNUSED", ()):
            return False
        part = getattr(part, name)
    return part != yaml_text.read(change.partition("=")[2]) and key not in map(_key, variant.changes)


def _in_a_name(change: str) -> str:
    """Of the folder of a run that takes the change; one that took others is never in its place."""
    return re.sub(r"[^\w.+-]+", "-", _short(change))


def _short(change: str) -> str:
    key, _, value = change.partition("=")
    return f"{key.strip().rpartition('.')[2]}={value.strip()}"


def _key(change: str) -> str:
    return change.partition("=")[0].strip()
