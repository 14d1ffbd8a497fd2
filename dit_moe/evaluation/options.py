"""The options of `dit-moe eval`: which extractor and metrics they name, and which files it writes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from dit_moe.config import build, override, section
from dit_moe.distributed import locked
from dit_moe.evaluation.recipes import EVALUATION
from dit_moe.evaluation.sources import IMAGES_FILE
from dit_moe.evaluation.sources.base import ReadOptions
from dit_moe.experiments.image import MOST_SEEDS
from dit_moe.extractors import EXTRACTORS
from dit_moe.extractors.choice import chosen_extractor
from dit_moe.extractors.function import FunctionConfig
from dit_moe.extractors.inception import InceptionConfig
from dit_moe.files import require_output
from dit_moe.metrics import METRICS
from dit_moe.metrics.kid import KIDConfig
from dit_moe.registry import did_you_mean
from dit_moe.sampling.outputs import SAMPLE_JSON

SHORT = {  # names of metrics on the command line
    "fid": "fd",
    "sfid": "sfd",
    "is": "inception_score",
    "pr": "precision_recall",
    "dc": "density_coverage",
}
OF_INCEPTION = ("fid", "sfid")
ENDINGS = {"out": ".json", "save_stats": ".npz", "save_npz": ".npz"}  # of the files that these options name
FEATURE_FOLDERS = re.compile(r"reference|heldout|noise|reconstruction|samples_\d+")  # in the folder of --features


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """The options of `dit-moe eval`, by their names there; None: not given. ValueError for a value without sense."""

    metrics: str | tuple[Any, ...] | None = None  # names, or configs of metrics
    extractor: str | None = None
    weights: str | None = None
    any_weights: bool = False
    kid_subset_size: int | None = None
    allow_few: bool = False
    recipe: str | None = None
    seeds: int | None = None
    sampling: str | None = None
    size: int | None = None
    channels: int | None = None
    value_range: str | None = None  # --range
    workers: int = 0
    out: Path | None = None
    features: Path | None = None
    save_stats: Path | None = None
    save_npz: Path | None = None

    def __post_init__(self) -> None:
        if self.seeds is not None and not 1 <= self.seeds <= MOST_SEEDS:
            raise ValueError(f"--seeds {self.seeds} must be at least 1 and at most {MOST_SEEDS}")
        if self.kid_subset_size is not None and self.kid_subset_size < 2:
            raise ValueError(f"--kid-subset-size {self.kid_subset_size} must be at least 2 images")
        self.read()
        self.metric_names()

    def metric_names(self) -> list[str] | None:
        """Those that the options name; None if they name none."""
        if self.metrics is None:
            return None if self.recipe is None else list(EVALUATION[self.recipe].metrics)
        if isinstance(self.metrics, tuple):
            return [METRICS.name_of(each) for each in self.metrics]
        names = [name for each in self.metrics.split(",") if (name := each.strip().lower())]
        if not names:
            raise ValueError(f"--metrics {self.metrics!r} names none; give some of {', '.join(METRICS.names())}")
        known = [*METRICS.names(), *SHORT]
        for name in names:
            if name not in known:
                raise ValueError(f"--metrics {','.join(names)}: {name!r} is no metric; {did_you_mean(name, known)}")
        return names

    def read(self) -> ReadOptions:
        """How files of images are read."""
        bounds = None
        if self.value_range is not None:
            try:
                low, high = map(float, self.value_range.split(","))
            except ValueError:
                raise ValueError(f"--range {self.value_range} must be two numbers: --range=-1,1") from None
            bounds = (low, high)
        return ReadOptions(size=self.size, channels=self.channels, value_range=bounds, workers=self.workers)


@dataclass(frozen=True, kw_only=True)
class _Metrics:
    metrics: tuple[Annotated[Any, METRICS], ...]


def read_changes(
    names: Sequence[str], changes: Sequence[str], options: EvalOptions
) -> tuple[list[str], list[str], EvalOptions]:
    """`names`, `changes` and `options` with what changes to a section ``eval`` say in their place: ``eval.seeds=1``.

    ValueError for one that has no sense here, or that an option says, too.
    """
    names, left, found = list(names), list[str](), dict[str, Any]()
    for change in changes:
        key, _, value = change.partition("=")
        field = key.removeprefix("eval.")
        if field == key:
            left.append(change)
        elif value == "null":
            raise ValueError(f"{change} has no option that says it; give the value that is wanted, or leave it out")
        elif field == "images":
            left.append(f"count={value}")
        elif field == "reference" and len(names) == 1:
            names.append(value)
        elif field == "seeds" and re.fullmatch(r"[0-9]{1,9}", value):
            found["seeds"] = int(value)
        elif field == "metrics":
            found["metrics"] = _read_metrics(change)
        elif field == "extractor":
            found["extractor"] = value
        else:
            raise ValueError(f"{change} is no option of an evaluation; see dit-moe eval --help")
        if getattr(options, field, None) is not None:
            raise ValueError(f"{change} and --{field} {getattr(options, field)}: give one of them")
    return names, left, replace(options, **found)


def _read_metrics(change: str) -> str | tuple[Any, ...]:
    """Of ``eval.metrics=…``: names with commas between them, or configs where one has options of its own."""
    given = override({}, [change])["eval"]["metrics"]
    if not isinstance(given, list):
        return str(given)
    if all(isinstance(each, str) for each in given):
        return ",".join(given)
    full = [SHORT.get(each, each) if isinstance(each, str) else each for each in given]
    with section("eval"):
        return build(_Metrics, {"metrics": full}).metrics


def extractor_names() -> list[str]:
    """Of the extractors that are chosen by name alone."""
    return [name for name in EXTRACTORS.names() if EXTRACTORS.config_class(name) is not FunctionConfig]


def extractor_config(options: EvalOptions, default: Any, choose: Callable[[], Any] = InceptionConfig) -> Any:
    """The config of the extractor that the options name; else `default`; if that is None, what `choose` returns."""
    text = options.extractor
    if text is None and options.recipe is not None:
        text = EVALUATION[options.recipe].extractor
    chosen = chosen_extractor(text, default)
    if chosen is None:
        chosen = choose()
    own = {field.name for field in fields(chosen)}
    if options.weights == "":
        raise ValueError("--weights is empty; name a file, or leave it out")
    given = {"--weights": (options.weights, "weights"), "--any-weights": (options.any_weights, "verify")}
    for option, (value, name) in given.items():
        if value and name not in own:
            raise ValueError(f"{option}: the extractor {EXTRACTORS.name_of(chosen)} takes no such weights; drop it")
    if options.weights:
        chosen = replace(chosen, weights=options.weights)
    return replace(chosen, verify=False) if options.any_weights else chosen


def metric_configs(
    options: EvalOptions, extractor: Any, default: Sequence[object] | None, is_fid: bool = False
) -> Sequence[object] | None:
    """Configs of the metrics that the options name; `default`, which may be None, if they name none.

    `extractor` is a config, or None for a space that files of statistics name, which `is_fid` or is not.
    """
    subset_size = options.kid_subset_size
    names = options.metric_names()
    if names is None:
        if subset_size is None:
            return default
        names = [METRICS.name_of(each) for each in default or ()] or list(EXTRACTORS.factory(extractor).metrics)
    for name in names:
        if name in OF_INCEPTION and not (is_fid or isinstance(extractor, InceptionConfig)):
            of = "what the statistics say, or nothing" if extractor is None else EXTRACTORS.name_of(extractor)
            problem = f"--metrics {name} is of the Inception network, and the extractor is {of}"
            raise ValueError(f"{problem}; say --extractor inception, or --metrics {SHORT[name]} for the distance in it")
    if isinstance(options.metrics, tuple):
        built = list(options.metrics)
    else:
        built = [METRICS.config_class(name)() for name in dict.fromkeys(SHORT.get(name, name) for name in names)]
    if subset_size is None:
        return built
    if not any(isinstance(each, KIDConfig) for each in built):
        raise ValueError(f"--kid-subset-size {subset_size}: kid is not among the metrics; add it, or drop it")
    return [replace(each, subset_size=subset_size) if isinstance(each, KIDConfig) else each for each in built]


# ---------------------------------------------------------------------------------------------- files that are written


def features_folder(options: EvalOptions) -> Path | None:
    """Where features are kept: as --features says, or beside the first file that is written."""
    if options.features is not None:
        return options.features
    beside = next(iter(_written(options).values()), None)
    if beside is None:
        return None
    return beside.with_name(f"{beside.name.removesuffix('.json').removesuffix('.npz')}.features")


def require_outputs(options: EvalOptions, reads: Sequence[str]) -> None:
    """ValueError if a file could not be written, or would take the place of what is read or written."""
    taken = {os.path.realpath(file) for name in reads for file in (Path(name), Path(name) / IMAGES_FILE)}
    for field, path in _written(options).items():
        option = f"--{field.replace('_', '-')}"
        require_output(path, option, ENDINGS[field], "metrics")
        if os.path.realpath(path) in taken:
            raise ValueError(f"{option} {path} would overwrite what is read or written; name another file")
        if path.name == IMAGES_FILE and (path.parent / SAMPLE_JSON).is_file():
            problem = f"{path.parent / SAMPLE_JSON} says how the {IMAGES_FILE} beside it was made"
            raise ValueError(f"{option} {path}: {problem}; name another file")
        taken.add(os.path.realpath(path))
    folder = features_folder(options)
    if folder is not None and folder.is_dir():
        others = sorted(each.name for each in folder.iterdir() if not FEATURE_FOLDERS.fullmatch(each.name))
        if others:
            raise ValueError(
                f"--features {folder} holds {others[0]}, which is no folder of features; name another folder"
            )


@contextmanager
def locked_outputs(options: EvalOptions) -> Iterator[None]:
    """While entered, no other command writes the same files or features. ValueError, on all processes, if one does."""
    folder = features_folder(options)
    with ExitStack() as held:
        for path in [*_written(options).values(), *([] if folder is None else [folder])]:
            held.enter_context(locked(path.parent, path.name))
        yield


def _written(options: EvalOptions) -> dict[str, Path]:
    return {option: path for option in ENDINGS if (path := getattr(options, option)) is not None}
