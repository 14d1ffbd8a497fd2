"""What a study is: its file, and the configs of its variants."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dit_moe import built_in, config, yaml_text
from dit_moe.config import ConfigError, require
from dit_moe.evaluation.heldout_loss import HeldoutConfig
from dit_moe.experiments import own_images
from dit_moe.registry import did_you_mean
from dit_moe.tasks import AnyExperiment, task_of

BUILT_IN = "studies/"  # where built-in studies are, among the configs
FILE = "study.yaml"  # of a study, in the folder of its results
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the things compared: a config file, with changes."""

    name: str  # of its folder; tables and pictures show its label
    label: str | None = None  # None: the name
    config: str | None = None  # a config file instead of the study's
    changes: tuple[str, ...] = ()  # key=value, after the study's own
    baseline: str | None = None  # the variant that this one's differences are to; None: the study's
    max_seeds: int | None = None  # of the study's seeds the first so many; None: all
    options_of: str | None = None  # the variant whose searched options this one takes; None: a search of its own

    def __post_init__(self) -> None:
        fits = _FOLDER_NAME.fullmatch(self.name) is not None
        require(fits, self, "name", "must be letters, digits and .+-_, as it names a folder")
        require(self.max_seeds is None or self.max_seeds >= 1, self, "max_seeds", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What is chosen for each variant by itself before the study: one option after the other, by the held-out loss."""

    rounds: tuple[tuple[str, ...], ...]  # each of key=value alternatives to what the config says, all of one key
    seed: int = 0  # of training; none of the study's
    steps: int | None = None  # of training; None: as many as the study

    def __post_init__(self) -> None:
        require(self.steps is None or self.steps >= 1, self, "steps", "must be at least 1")
        for i, alternatives in enumerate(self.rounds):
            keys = {change.partition("=")[0].strip() for change in alternatives if "=" in change}
            if len(keys) != 1 or not all("=" in change for change in alternatives):
                raise ConfigError(f"rounds[{i}]", " must be alternatives key=value of one key, such as [train.lr=1e-3]")


@dataclass(frozen=True, kw_only=True)
class Study:
    """Several variants, each trained with several seeds and scored alike; configs are beside its file, or built-in."""

    title: str
    config: str  # what every variant starts from …
    changes: tuple[str, ...] = ()  # … with these key=value changes
    variants: tuple[Variant, ...]
    baseline: str  # name of the variant that differences are to
    seeds: tuple[int, ...] = (0, 1, 2)
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)
    metric: str | None = None  # a number of the evaluation's report, by its dotted name; None: the loss alone
    timing_steps: int = 5  # timed training steps of each variant, three times over; 0: no timing
    search: SearchConfig | None = None  # None: every variant is trained as it is written

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        require(bool(names), self, "variants", "is empty; list at least one")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError("variants", f" has two called {twice[0]}; rename one, each has a folder of its own")
        require(bool(self.seeds), self, "seeds", "is empty; give at least one")
        require(len(set(self.seeds)) == len(self.seeds), self, "seeds", "has one twice; drop it")
        require(min(self.seeds) >= 0, self, "seeds", "must be whole numbers from 0")
        require(self.timing_steps >= 0, self, "timing_steps", "must be at least 0")
        if self.search is not None and self.search.seed in self.seeds:
            problem = f"={self.search.seed} is one of `seeds`, and a choice must not be judged by what it was made on"
            raise ConfigError("search.seed", f"{problem}; take another")
        if self.baseline not in names:
            raise ConfigError("baseline", f"={self.baseline} is no variant; {did_you_mean(self.baseline, names)}")
        if self.variant(self.baseline).options_of is not None:
            problem = f"={self.baseline} has `options_of`, and the search begins with the baseline's own; drop it there"
            raise ConfigError("baseline", problem)
        for i, variant in enumerate(self.variants):
            if variant.baseline not in (None, *names):
                known = did_you_mean(str(variant.baseline), names)
                raise ConfigError(f"variants[{i}].baseline", f"={variant.baseline} is no variant; {known}")
            source = next((each for each in self.variants if each.name == variant.options_of), None)
            if variant.options_of is not None and (source is None or source.options_of is not None):
                what = "is no variant" if source is None else "has no search of its own"
                searched = [each.name for each in self.variants if each.options_of is None]
                known = did_you_mean(variant.options_of, searched)
                raise ConfigError(f"variants[{i}].options_of", f"={variant.options_of} {what}; {known}")
            for change in (*self.changes, *variant.changes):
                if change.partition("=")[0].strip() == "seed":
                    raise ConfigError(f"variants[{i}].changes", " sets the seed; list it in `seeds`")

    def variant(self, name: str) -> Variant:
        """The one of that name; ConfigError if there is none."""
        found = {variant.name: variant for variant in self.variants}
        if name not in found:
            raise ConfigError(name, f" is no variant of the study; {did_you_mean(name, found)}")
        return found[name]

    def baseline_of(self, variant: Variant) -> str:
        return variant.baseline or self.baseline

    def seeds_of(self, variant: Variant) -> tuple[int, ...]:
        return self.seeds[: variant.max_seeds]


def find_study(word: str) -> Path:
    """The file of a study: a path, the folder of its results, or the name of a built-in one. ConfigError for others."""
    kept = Path(word, FILE)
    return kept if kept.is_file() else built_in.find(word, below=BUILT_IN, kind="study")


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study. Overrides of its own keys ("seeds=[0]") change it, all others every variant ("train.steps=20").

    ConfigError for any mistake in it; variants are looked at when their experiments are made.
    """
    own = set(Study.__dataclass_fields__)
    of_study = [each for each in overrides if each.partition("=")[0].split(".")[0] in own]
    tree = config.load(path, of_study)
    written = yaml_text.read(path.read_text(encoding="utf-8")) or {}
    if "base" in written:  # files that it names would be looked for beside this one
        raise ConfigError(f"{path}: base", " is for configs, and this is a study; copy what it is to have of the other")
    changes = tree.get("changes") or []
    if isinstance(changes, list):  # what else it may be is refused below
        tree["changes"] = [*changes, *(each for each in overrides if each not in of_study)]
    return config.build(Study, tree)


def with_found_configs(study: Study, folder: Path) -> Study:
    """The study with configs that are found from any folder: built-in ones by name, others by their whole path."""

    def found(config: str) -> str:
        path = built_in.find(config, beside=folder)
        return built_in.name_of(path) or str(path.resolve())

    variants = []
    for variant in study.variants:
        with of_variant(variant.name):
            variants.append(replace(variant, config=variant.config and found(variant.config)))
    return replace(study, config=found(study.config), variants=tuple(variants))


def experiment_tree(study: Study, variant: Variant, seed: int, folder: Path) -> config.Tree:
    """The config of one run, not yet typed; files are named relative to `folder`, the study's own.

    ConfigError for a file that is not there and for changes that cannot be read.
    """
    path = built_in.find(variant.config or study.config, beside=folder)
    return own_images.load(path, [*study.changes, *variant.changes, f"seed={seed}"])


def require_taken(study: Study, overrides: Sequence[str], folder: Path) -> None:
    """ConfigError for what is to hold for all variants, and a variant's own `changes` undo.

    That is every change from the command line, and of the study's config and changes the options that are lost where a
    variant names another router, or another entry of another kind. One that the variant sets itself, or does not have,
    is none of these.
    """
    last = {_key(each): each for each in overrides}  # of one key
    given = [each for key, each in last.items() if key.split(".")[0] not in Study.__dataclass_fields__]
    for variant in study.variants:
        own = [_key(each) for each in variant.changes]
        if not given and not own:
            continue
        with of_variant(variant.name):
            tree = experiment_tree(study, variant, study.seeds[0], folder)
            alone = experiment_tree(study, replace(variant, changes=()), study.seeds[0], folder)
            below = [f"{key}={json.dumps(value)}" for key, value in _options_below(alone, own) if key not in own]
            for each in [*given, *below]:
                if _is_undone(tree, each) and not _is_undone(alone, each):
                    undo = (
                        f" is for all variants, and the variant's own `changes` undo it: {', '.join(variant.changes)}"
                    )
                    remedy = "leave it out, or change it in a copy of the study's file"
                    if each in below:
                        remedy = "repeat it there, after them, or move it to the variants that it is for"
                    raise ConfigError(each, f"{undo}; {remedy}")


def _options_below(tree: config.Tree, keys: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """What a config says of the options of the entries that `keys` name: dotted key, value."""
    for key in keys:
        part: Any = tree
        for name in (at := key.removesuffix(".name")).split("."):
            part = part.get(name) if isinstance(part, dict) else None
        for name, value in part.items() if isinstance(part, dict) else ():
            if name != "name":
                yield f"{at}.{name}", value


def _key(change: str) -> str:
    return change.partition("=")[0].strip()


def _is_undone(tree: config.Tree, change: str) -> bool:
    """Whether an experiment that takes a change is another without it."""
    task = task_of(tree)
    try:
        changed = task.build_experiment(config.override(tree, [change]))
    except ConfigError:
        return False
    return config.dump(changed) != config.dump(task.build_experiment(tree))


def experiments_of(study: Study, folder: Path, variants: Iterable[Variant] | None = None) -> dict[str, AnyExperiment]:
    """By the variant's name; fields that follow from the data are open. ConfigError, naming the variant, for mistakes.

    `folder` is the study's, which its files are named relative to.
    """
    experiments = {}
    for variant in study.variants if variants is None else variants:
        with of_variant(variant.name):
            tree = experiment_tree(study, variant, study.seeds[0], folder)
            experiments[variant.name] = task_of(tree).build_experiment(tree)
    return experiments


@contextmanager
def of_variant(name: str) -> Iterator[None]:
    """Within it a mistake in a config says whose it is."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"variant {name}: {error.path}", error.problem) from None
