"""The options of `dit-moe eval`, and what they say of extractor, metrics and reading."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from dit_moe import config, yaml_text
from dit_moe.config import ConfigError
from dit_moe.evaluation.recipes import EVALUATION, SAMPLING, EvaluationRecipe
from dit_moe.evaluation.sources.base import ReadOptions
from dit_moe.extractors import EXTRACTORS
from dit_moe.extractors.function import FunctionConfig
from dit_moe.extractors.inception import InceptionConfig
from dit_moe.metrics import METRICS
from dit_moe.metrics.kid import KIDConfig
from dit_moe.registry import did_you_mean

SHORT = {  # on the command line
    "fid": "fd",
    "sfid": "sfd",
    "is": "inception_score",
    "pr": "precision_recall",
    "dc": "density_coverage",
}
RECIPES = "; ".join(f"{recipe.name}, {recipe.summary}" for recipe in EVALUATION.values())
OF_INCEPTION = ("fid", "sfid")


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything behind the words themselves."""
    names, short = ", ".join(METRICS.names()), ", ".join(f"{key} = {value}" for key, value in SHORT.items())
    what = parser.add_argument_group("what is measured")
    what.add_argument("--metrics", metavar="A,B", help=f"of {names}; {short}; default: those that suit the extractor")
    what.add_argument(
        "--extractor",
        metavar="NAME",
        help=f"feature space: {', '.join(_extractors())}, {{name: …, option: …}}, or package.module:function of "
        "your own; default: that of the run's config, digits_cnn64 for the digits, otherwise inception",
    )
    what.add_argument("--weights", metavar="FILE", help="the extractor's weights; default: downloaded once")
    what.add_argument(
        "--any-weights", action="store_true", help="take weights of another checksum; no number is then called FID"
    )
    what.add_argument("--kid-subset-size", type=int, metavar="N", help="images in a subset of KID; default 1000")
    what.add_argument("--allow-few", action="store_true", help="FID of fewer than 2048 images, mostly sampling error")
    what.add_argument(
        "--recipe", choices=list(EVALUATION), help=f"measure as published numbers are, or refuse: {RECIPES}"
    )

    runs = parser.add_argument_group("runs as SAMPLES")
    runs.add_argument(
        "--seeds", type=int, metavar="N", help="sampling seeds; default: the run's eval.seeds, 1 with --recipe"
    )
    runs.add_argument(
        "--sampling",
        metavar="NAME",
        help=f"sample as a published baseline was, before any key=value: {', '.join(SAMPLING)}",
    )

    reading = parser.add_argument_group("how images are read")
    reading.add_argument(
        "--size", type=int, metavar="N", help="crop and resize to N×N as ADM does; default: as they are"
    )
    reading.add_argument("--channels", type=int, choices=(1, 3), help="3: repeat grey images; 1: grey of colour ones")
    reading.add_argument(
        "--range", dest="value_range", metavar="LOW,HIGH", help="of float images, for instance --range=-1,1"
    )
    reading.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode; default 0")

    where = parser.add_argument_group("where things go")
    where.add_argument("--out", type=Path, metavar="FILE.json", help="write the result here too")
    where.add_argument(
        "--features",
        type=Path,
        metavar="FOLDER",
        help="keep features here, so that the same command goes on where it stopped; default: FILE.features beside the "
        "first file that --out, --save-stats or --save-npz writes",
    )
    where.add_argument("--save-stats", type=Path, metavar="FILE.npz", help="mu, sigma, mu_s, sigma_s of SAMPLES")
    where.add_argument("--save-npz", type=Path, metavar="FILE.npz", help="the images of SAMPLES, as ADM reads them")


def read_options(args: argparse.Namespace) -> ReadOptions:
    """How images are read. ValueError naming the option that makes no sense, be it of reading or not."""
    if args.seeds is not None and args.seeds < 1:
        raise ValueError(f"--seeds {args.seeds} must be at least 1")
    if args.kid_subset_size is not None and args.kid_subset_size < 2:
        raise ValueError(f"--kid-subset-size {args.kid_subset_size} must be at least 2 images")
    bounds = None
    if args.value_range is not None:
        try:
            low, high = map(float, args.value_range.split(","))
        except ValueError:
            raise ValueError(f"--range {args.value_range} must be two numbers: --range=-1,1") from None
        bounds = (low, high)
    return ReadOptions(size=args.size, channels=args.channels, value_range=bounds, workers=args.workers)


def extractor_config(args: argparse.Namespace, default: Any) -> Any:
    """The config of the extractor that the options name; `default` if they name none."""
    recipe = EVALUATION.get(args.recipe)
    text: str | None = recipe.extractor if recipe is not None and args.extractor is None else args.extractor
    chosen = default if text is None else _named(text)
    own = {field.name for field in fields(chosen)}
    if args.weights == "":
        raise ValueError("--weights is empty; name a file, or leave it out")
    for option, value, name in (("--weights", args.weights, "weights"), ("--any-weights", args.any_weights, "verify")):
        if value and name not in own:
            raise ValueError(f"{option}: the extractor {EXTRACTORS.name_of(chosen)} takes no such weights; drop it")
    if args.weights:
        chosen = replace(chosen, weights=args.weights)
    return replace(chosen, verify=False) if args.any_weights else chosen


def _extractors() -> list[str]:
    """Those that are chosen by name alone."""
    return [name for name in EXTRACTORS.names() if EXTRACTORS.config_class(name) is not FunctionConfig]


def _named(text: str) -> Any:
    """The config that --extractor means; ValueError naming what is wrong with it."""
    text = text.strip()
    own = "--extractor package.module:function"
    if text.startswith("{"):
        return _section(text)
    if ":" in text:
        try:
            return FunctionConfig(path=text)
        except ConfigError:
            raise ValueError(f"--extractor {text} is no function of a module; write {own}") from None
    if text in _extractors():
        return EXTRACTORS.config_class(text)()
    if text in EXTRACTORS.names():
        raise ValueError(f"--extractor {text}: of which? write {own}")
    module, _, function = text.rpartition(".")
    if module:
        raise ValueError(f"--extractor {text} is no extractor; if it is a function, write {module}:{function}")
    raise ValueError(f"--extractor {text} is no extractor; {did_you_mean(text, _extractors())}, or {own}")


def _section(text: str) -> Any:
    wanted = "wanted --extractor '{name: inception, weights: FILE}'"
    try:
        section = yaml_text.read(text)
    except ValueError as error:
        closed = text.count("{") <= text.count("}")
        hint = "are its commas, colons and brackets right?" if closed else "a closing } is missing?"
        raise ValueError(f"--extractor {text} is not valid YAML ({error}): {hint} {wanted}") from None
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        raise ValueError(f"--extractor {text} has no name; {wanted}")
    try:
        return config.build(_ExtractorOption, {"extractor": section}).extractor
    except ConfigError as error:
        raise ValueError(f"--extractor {text}: {error.path.removeprefix('extractor.')}{error.problem}") from None


@dataclass(frozen=True)
class _ExtractorOption:
    extractor: Annotated[Any, EXTRACTORS]


def metric_configs(
    args: argparse.Namespace, extractor: Any, default: Sequence[object] | None, is_fid: bool = False
) -> Sequence[object] | None:
    """Configs of the metrics that the options name; `default`, which may be None, if they name none.

    `extractor` is a config, or None for a space that files of statistics state, which `is_fid` or is not.
    """
    recipe: EvaluationRecipe | None = EVALUATION.get(args.recipe)
    words = list(recipe.metrics) if recipe else None
    if args.metrics is not None:
        words = [word for each in args.metrics.split(",") if (word := each.strip().lower())]
        if not words:
            raise ValueError(f"--metrics {args.metrics!r} names none; give some of {', '.join(METRICS.names())}")
    if words is None:
        if args.kid_subset_size is None:
            return default
        words = [METRICS.name_of(each) for each in default or ()] or list(extractor_metrics(extractor))
    known = [*METRICS.names(), *SHORT]
    for word in words:
        if word not in known:
            raise ValueError(f"--metrics {','.join(words)}: {word!r} is no metric; {did_you_mean(word, known)}")
        if word in OF_INCEPTION and not (is_fid or isinstance(extractor, InceptionConfig)):
            name = "what the statistics say, or nothing" if extractor is None else EXTRACTORS.name_of(extractor)
            problem = f"--metrics {word} is of the Inception network, and the extractor is {name}"
            raise ValueError(f"{problem}; say --extractor inception, or --metrics {SHORT[word]} for the distance in it")
    names = dict.fromkeys(SHORT.get(word, word) for word in words)
    built = [METRICS.config_class(name)() for name in names]
    if args.kid_subset_size is not None:
        if not any(isinstance(each, KIDConfig) for each in built):
            raise ValueError(
                f"--kid-subset-size {args.kid_subset_size}: kid is not among the metrics; add it, or drop it"
            )
        built = [
            replace(each, subset_size=args.kid_subset_size) if isinstance(each, KIDConfig) else each for each in built
        ]
    return built


def extractor_metrics(extractor: Any) -> tuple[str, ...]:
    """Names of the metrics that suit the extractor of this config."""
    metrics: tuple[str, ...] = EXTRACTORS.factory(extractor).metrics
    return metrics
