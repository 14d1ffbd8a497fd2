"""Which format weights are of, and weights opened as if they were the checkpoint of a run."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from dit_moe import checkpoint, config
from dit_moe.checkpoint import Checkpoint, Part
from dit_moe.config import ConfigError, Tree
from dit_moe.data.listing import note
from dit_moe.formats.base import FORMATS, Format, Found, NotThisFormat
from dit_moe.formats.rules import to_ours
from dit_moe.formats.sources import Source, Which, holds_weights, is_source, open_source
from dit_moe.json_files import read_object
from dit_moe.models import MODELS
from dit_moe.registry import did_you_mean

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class _Model:
    model: Annotated[Any, MODELS]


@dataclass(frozen=True)
class Weights(Checkpoint):
    """Weights of another suite in the place of a run's checkpoint: read as one, with nothing written anywhere."""

    source: Source
    format: Format
    tree: Tree  # the config of a run with them

    def config(self) -> Tree:
        return self.tree

    def weights(self, part: Part) -> dict[str, Tensor]:
        if part == "optimizer":
            raise ValueError(f"{self.folder} holds no state of an optimizer of ours; train from it by train.init_from")
        with torch.device("meta"):
            own = checkpoint.state_of(MODELS.build(self.model))
        return to_ours(self.format.rules(self.model), own, self.source.tensors(part), self.format.ignored)

    def sha256(self, part: Part) -> str:
        return self._sha256

    @property
    def run(self) -> Path:
        return home_of(self.folder).absolute()

    @property
    def started_in(self) -> Path:
        return Path.cwd()

    @cached_property
    def _sha256(self) -> str:
        return self.source.sha256()

    @cached_property
    def model(self) -> Any:
        return typed_model(self.tree["model"])

    def check(self) -> None:
        """ValueError that lists the tensors that are missing, left over or of another shape; reads no number."""
        on_meta: dict[str, Tensor] = {name: tensor.to("meta") for name, tensor in self.source.tensors("ema").items()}
        replace(self, source=replace(self.source, weights={"ema": on_meta})).weights("ema")


def typed_model(section: Tree) -> Any:
    """The section `model` of a config, typed; ConfigError for what is missing in it."""
    return config.build(_Model, {"model": section}).model


def is_weights(path: str | Path) -> bool:
    """Whether `path` is a run, or weights that `open_model` can open in its place."""
    return checkpoint.is_run(path) or is_source(path)


def home_of(path: str | Path) -> Path:
    """The run folder that results of a run, or of weights in its place, go to unless the user says otherwise.

    Weights never share that of a run, whose autoencoder and results are its own, or of other weights with their name.

    ValueError if there is no checkpoint in the folder of the run.
    """
    if not holds_weights(path):
        return checkpoint.run_of(checkpoint.find(path))
    home = Path("runs", _name_of(path) if Path(path).is_dir() else Path(path).stem)
    while checkpoint.is_run(home) or (home / checkpoint.CONFIG).exists() or _has_results_of_another(home, path):
        home = home.with_name(f"{home.name}-weights")
    return home


def _has_results_of_another(home: Path, path: str | Path) -> bool:
    """Whether a result in this folder says that it is of something else than `path`."""
    for result in sorted((*home.glob("*.json"), *home.glob("*/*.json"))):
        found = read_object(result)
        facts = found.get("facts")
        for told in (found.get("run"), facts.get("run") if isinstance(facts, dict) else None):
            if isinstance(told, str) and os.path.realpath(told) != os.path.realpath(path):
                return True
    return False


def _name_of(path: str | Path) -> str:
    """What a path, also ".", is called."""
    return os.path.basename(os.path.abspath(path))


def open_model(path: str | Path) -> Checkpoint:
    """The newest checkpoint of a run folder, a checkpoint folder or, in its place, weights of another suite.

    ValueError as of `checkpoint.open_checkpoint` and `recognise`.
    """
    if not holds_weights(path):
        return checkpoint.open_checkpoint(path)
    try:
        return recognise(path)
    except ConfigError as error:  # only what is made by an import can be given what weights do not tell
        made = f"dit-moe import {shlex.quote(str(path))} {error.path}=… --out RUN"
        told = f"; the weights do not tell it, so make a run of them that does, and name it instead: {made}"
        raise type(error)(error.path, error.problem + told) from None


def recognise(path: str | Path, name: str = AUTO, overrides: Sequence[str] = (), which: Which = "ema") -> Weights:
    """Open a file or folder of weights as the format `name`, or as the only one that fits.

    Of several that fit, that which publishes a file under this name is taken, and it is said.

    Args:
        overrides: ``key=value`` changes to the config, which also give what cannot be told from the weights.
        which: the weights that are checked and, if it is the raw ones, taken in the place of the averaged.

    Raises ValueError if no format fits, or several do; ConfigError for what is missing in the config.
    """
    source, name = open_source(path), name.replace("-", "_")
    if name != AUTO and name not in FORMATS.names():
        raise ValueError(f"--format {name} is not known; {did_you_mean(name, [AUTO, *FORMATS.names()])}")
    if which == "model":
        source = replace(source, weights={"ema": source.tensors("model")})
    found = Found(source.tensors("ema"), source.settings, source.path if source.path.is_dir() else None)
    fitting: dict[str, Weights] = {}
    problems: dict[str, Exception] = {}
    classes: dict[str, Any] = {each: FORMATS.config_class(each) for each in FORMATS.names()}
    tried = [each for each, format_class in classes.items() if not format_class.by_name_only]
    for each in tried if name == AUTO else [name]:
        format_ = FORMATS.config_class(each)()
        try:
            fitting[each] = _opened(source, each, found, config.override(_experiment(format_, found), overrides))
            fitting[each].check()
        except ConfigError as error:  # fits as far as it is known
            misfit = _misfit(fitting[each]) if each in fitting else None
            problems[each] = misfit or error
            if misfit is not None:
                del fitting[each]
        except ValueError as error:
            fitting.pop(each, None)
            problems[each] = error
    published = {each: classes[each].published for each in fitting if classes[each].published is not None}
    named = [each for each, pattern in published.items() if re.fullmatch(pattern, _name_of(path))]
    if len(fitting) > len(named) == 1:
        told = f"{path} is taken for weights of {classes[named[0]].suite}, which are published under this name"
        note(f"{told}; if it is of {' or '.join(each for each in fitting if each not in named)}, import it by --format")
        fitting = {named[0]: fitting[named[0]]}
    if len(fitting) > 1:
        command = f"dit-moe import {path} --format {next(iter(fitting))} --out RUN"
        raise ValueError(f"{path} fits the formats {' and '.join(fitting)}; say which it is, for instance {command}")
    if not fitting:
        told = "; ".join(f"{each}: {error}" for each, error in problems.items())
        raise ValueError(f"{path} is of no format that is read here: {told}")
    (only, weights), *_ = fitting.items()
    if only in problems:
        raise problems[only]
    return weights


def _experiment(format_: Format, found: Found) -> Tree:
    """As `Format.experiment`; NotThisFormat also for settings of another kind, as beside anybody's weights."""
    try:
        return format_.experiment(found)
    except (TypeError, AttributeError, LookupError) as error:
        raise NotThisFormat(f"the settings beside the weights are not as the suite writes them ({error})") from None


def _misfit(weights: Weights) -> ValueError | None:
    """Why no number of heads, which decides the shape of hardly any tensor, would make the weights fit."""
    tree = weights.tree | {"model": weights.tree["model"] | {"heads": 1}}
    try:
        replace(weights, tree=tree).check()
    except ConfigError:
        return None
    except ValueError as error:
        return error
    return None


def _opened(source: Source, name: str, found: Found, tree: Tree) -> Weights:
    format_: Format = FORMATS.config_class(name)()
    classes = tree["model"].get("num_classes")
    state = {
        "step": 0,
        "files": {},
        "class_names": None if classes is None else format_.class_names(found, int(classes)),
        "exported": True,
        **format_.state(found),
        "imported": {"source": os.fspath(source.path.absolute()), "format": name, "suite": format_.suite},
    }
    return Weights(source.path, state, source, format_, tree)
