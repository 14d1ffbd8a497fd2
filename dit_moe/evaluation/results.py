"""Results of evaluations, one's own and published ones, as rows that can stand side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dit_moe.evaluation.published import Baseline

Report = Mapping[str, Any]
FILE = "metrics.json"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One result; None where it is not known.

    `values` are its numbers as metrics.json names them: ``fid``, ``fid_std``, ``fid_floor``, …, ``fd_<feature space>``.
    """

    source: str
    name: str | None = None  # of the samples, for rows without a model
    model: str | None = None
    router: str | None = None
    parameters: float | None = None
    active_parameters: float | None = None  # per token
    active_experts: float | None = None  # measured while sampling
    steps: int | None = None
    batch: int | None = None
    objective: str | None = None
    sampler: str | None = None  # with its steps
    evaluations: int | None = None
    guidance: float | None = None
    channels: int | None = None
    interval: tuple[float, float] | None = None
    weights: str | None = None
    sampling_recipe: str | None = None
    image_size: int | None = None  # side in pixels; None where not known, or not square
    n: int | None = None
    n_reference: int | None = None  # images of the statistics that the distance is to
    n_reference_images: int | None = None  # that precision, recall and their like are of
    seeds: int | None = None
    space: str = ""  # of the features; empty: the verified Inception's, those of published numbers
    values: Mapping[str, float] = field(default_factory=dict)
    measured: tuple[str, ...] = ()  # of `values`, those that are no spread, floor or count of another
    published: bool = False
    comparable: bool = False  # to published rows
    reasons: tuple[str, ...] = ()  # why not
    notes: tuple[str, ...] = ()  # what else to know


# ------------------------------------------------------------------------------------------------------------- reading


def read_result(path: str | Path) -> Row:
    """A result of ``dit-moe eval``: its file, or the folder that holds it as metrics.json.

    What it does not say stays open. Raises ValueError if there is no such file, or if it is of another kind.
    """
    path, file = Path(path), result_file(path)
    if not file.is_file():
        raise ValueError(f"{file} does not exist; name a result of dit-moe eval --out FILE.json, or its folder")
    try:
        report = json.loads(file.read_text())
    except ValueError:
        report = None
    if not isinstance(report, dict) or not isinstance(report.get("provenance"), dict):
        raise ValueError(f"{file} is no result of dit-moe eval, which says in `provenance` how it was made; name one")
    return _row(report, source=str(path))


def result_file(path: str | Path) -> Path:
    """Where the result is that `path` names."""
    return Path(path) / FILE if Path(path).is_dir() else Path(path)


def _row(report: Report, source: str) -> Row:
    facts = report["provenance"]
    samples = [each for each in _list(facts.get("samples")) if isinstance(each, dict)]
    made = [{**each, **_dict(each.get("sample"))} for each in samples]  # an npz's are in the file beside it
    shared = _Shared(made)
    extractor = facts.get("extractor")
    extractor = extractor if isinstance(extractor, dict) else {"name": extractor}
    space = "" if extractor.get("is_fid") is True else str(extractor.get("name") or "unknown features")
    reasons = tuple(_list(facts.get("not_comparable_because")))
    comparable = facts.get("comparable_to_published") is True and not reasons
    guided = shared("experiment", "sample", "guidance")
    interval = _dict(guided).get("interval")
    router = shared("experiment", "model", "moe", "router")
    values = _numbers(report, space)
    counts = [value for name, value in values.items() if name.endswith("_n_reference")]
    n_reference, n_images = _reference_counts(facts)
    return Row(
        source=source,
        name=_short(made[0].get("name") if made else None) or _short(source),
        model=shared("experiment", "model", "name") or shared("model"),
        router=_name(router) if router is not None else "dense" if shared("experiment", "model") else None,
        parameters=shared("parameters"),
        active_parameters=shared("active_parameters"),
        active_experts=_active(report, made),
        steps=shared("step"),
        batch=shared("experiment", "train", "batch_size"),
        objective=_name(shared("experiment", "objective")),
        sampler=_name(shared("experiment", "sample", "sampler"), "steps"),
        evaluations=shared("evaluations"),
        guidance=_dict(guided).get("scale"),
        channels=_dict(guided).get("channels"),
        interval=None if interval in (None, [0, 1]) else (interval[0], interval[1]),
        weights=shared("weights") or shared("experiment", "sample", "weights"),
        sampling_recipe=shared("recipe") or facts.get("sampling"),
        image_size=_side(shared),
        n=facts.get("n_gen"),
        n_reference=int(counts[0]) if counts else n_reference,
        n_reference_images=n_images,
        seeds=len(_list(facts.get("samples"))) or None,
        space=space,
        values=values,
        measured=tuple(name for name in values if _is_measured(name, report, space)),
        comparable=comparable,
        reasons=reasons if comparable or reasons else ("the result does not say whether it is comparable",),
    )


class _Shared:
    """Looks a setting up in how each seed's images were made: None where one lacks it, or where two differ."""

    def __init__(self, made: Sequence[Report]) -> None:
        self.made = made

    def __call__(self, *keys: str) -> Any:
        found = []
        for each in self.made:
            value: Any = each
            for key in keys:
                value = value.get(key) if isinstance(value, Mapping) else None
            found.append(value)
        return found[0] if found and all(value == found[0] for value in found) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _name(section: Any, *more: str) -> str | None:
    """The entry that a section of a config names, and options of it: "heun 125"."""
    if isinstance(section, dict):
        return " ".join(str(section[key]) for key in ("name", *more) if key in section) or None
    return section if isinstance(section, str) else None


def _short(name: Any) -> str | None:
    """The last two parts of a path, or all of another name."""
    return "/".join(Path(name).parts[-2:]).strip("/") if isinstance(name, str) and name else None


def _side(shared: _Shared) -> int | None:
    """Of the images that were compared."""
    shape = shared("image_shape")
    if shape is None and shared("experiment", "first_stage", "name") == "identity":
        return shared("experiment", "model", "input_size")
    return shape[-1] if isinstance(shape, list) and len(shape) == 3 and shape[1] == shape[2] else None


def _reference_counts(facts: Report) -> tuple[int | None, int | None]:
    """Images of the reference's statistics, and images that it holds."""
    return facts.get("n_ref_statistics"), facts.get("n_ref_images")


def _is_measured(name: str, report: Report, space: str) -> bool:
    """Whether a metric gave the number `name`, rather than it being a spread, a floor, a count or a duration."""
    spread = name.removesuffix(f"_{space}").endswith("_std")  # within a set, over its splits or subsets
    return isinstance(report.get(name), dict) or (f"{name}_heldout" in report and not spread)


def _active(report: Report, made: Sequence[Report]) -> float | None:
    """Of the evaluation's own sampling, or else the mean of what was recorded when the images were made."""
    active = report.get("active_experts")
    active = active.get("mean") if isinstance(active, dict) else active
    recorded: list[Any] = [each.get("active_experts") for each in made]
    if active is None and recorded and all(value is not None for value in recorded):
        active = sum(recorded) / len(recorded)
    return active


def _numbers(report: Report, space: str) -> dict[str, float]:
    """All numbers of a report; of a distance, ``generated`` goes by the distance's name."""
    numbers: dict[str, Any] = {}
    for name, value in report.items():
        if isinstance(value, dict) and "generated" in value:
            parts = {f"{name}_{part}": each for part, each in value.items()}
            numbers |= {part.replace(f"{name}_generated", name): each for part, each in parts.items()}
        else:
            numbers[name] = value
    barred = ("fid", "sfid") if space else ()  # whoever wrote them
    return {
        name: value
        for name, value in numbers.items()
        if type(value) in (int, float) and name.split("_")[0] not in barred
    }


def published_row(baseline: Baseline) -> Row:
    """A published result as a row."""
    names = ("fid", "sfid", "inception_score", "precision", "recall")
    shared = {each.name for each in fields(Row)} & {each.name for each in fields(Baseline)}
    return Row(
        **{name: getattr(baseline, name) for name in shared},
        n=50_000,
        seeds=1,
        values={name: value for name in names if (value := getattr(baseline, name)) is not None},
        published=True,
        notes=() if baseline.note is None else (baseline.note,),
    )
