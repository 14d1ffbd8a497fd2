"""What a study is: its file, read and checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dit_moe import config, yaml_text
from dit_moe.config import ConfigError, require
from dit_moe.evaluation.heldout_loss import HeldoutConfig
from dit_moe.registry import did_you_mean

BUILT_IN = Path(__file__).resolve().parents[2] / "configs" / "studies"
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the things compared: a config file, with changes."""

    name: str  # of its folder; tables and pictures show its label
    label: str | None = None  # None: the name
    config: str | None = None  # a config file instead of the study's
    changes: tuple[str, ...] = ()  # key=value, after the study's own
    baseline: str | None = None  # the variant that this one's differences are to; None: the study's

    def __post_init__(self) -> None:
        fits = _FOLDER_NAME.fullmatch(self.name) is not None
        require(fits, self, "name", "must be letters, digits and .+-_, as it names a folder")


@dataclass(frozen=True, kw_only=True)
class Study:
    """Several variants, each trained with several seeds and scored alike. Files are named relative to the study's."""

    title: str
    config: str  # what every variant starts from …
    changes: tuple[str, ...] = ()  # … with these key=value changes
    variants: tuple[Variant, ...]
    baseline: str  # name of the variant that differences are to
    seeds: tuple[int, ...] = (0, 1, 2)
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)
    metric: str | None = None  # a number of the evaluation's report, by its dotted name; None: the loss alone
    timing_steps: int = 5  # timed training steps of each variant, three times over; 0: no timing

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        require(bool(names), self, "variants", "is empty; list at least one")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError("variants", f" has two called {twice[0]}; rename one, each has a folder of its own")
        require(bool(self.seeds), self, "seeds", "is empty; give at least one")
        require(len(set(self.seeds)) == len(self.seeds), self, "seeds", "has one twice; drop it")
        require(min(self.seeds) >= 0, self, "seeds", "must be whole numbers from 0")
        require(self.timing_steps >= 0, self, "timing_steps", "must be at least 0")
        if self.baseline not in names:
            raise ConfigError("baseline", f"={self.baseline} is no variant; {did_you_mean(self.baseline, names)}")
        for i, variant in enumerate(self.variants):
            if variant.baseline not in (None, *names):
                known = did_you_mean(str(variant.baseline), names)
                raise ConfigError(f"variants[{i}].baseline", f"={variant.baseline} is no variant; {known}")
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


def find_study(word: str) -> Path:
    """The file of a study: a path, or the name of a built-in one. ConfigError if there is neither."""
    if Path(word).is_file():
        return Path(word)
    built_in = sorted(path.stem for path in BUILT_IN.glob("*.yaml"))
    if word in built_in:
        return BUILT_IN / f"{word}.yaml"
    raise ConfigError(word, f" is neither a file nor a built-in study; {did_you_mean(word, built_in)}")


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


def experiment_tree(study: Study, variant: Variant, seed: int, folder: Path) -> config.Tree:
    """The config of one run, not yet typed; files are named relative to `folder`, the study's own.

    ConfigError for a file that is not there and for changes that cannot be read.
    """
    path = folder / (variant.config or study.config)
    return config.load(path, [*study.changes, *variant.changes, f"seed={seed}"])
