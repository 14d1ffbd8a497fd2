"""The rows of a table of results: read from what `dit-moe eval` wrote, and from published.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_moe import yaml_text
from dit_moe.config import ConfigError, Tree, convert
from dit_moe.evaluation.comparability import Reason
from dit_moe.evaluation.report import Distance, Report, Value, is_spread
from dit_moe.files import missing
from dit_moe.json_files import Count, NonNegative, Size, load

FILE = "metrics.json"
PUBLISHED_VALUES = ("fid", "sfid", "inception_score", "precision", "recall")


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
    evaluations: int | None = None  # of the network per image; a guided one counts as 2
    guidance: float | None = None  # 1: none
    channels: int | None = None  # of the latents that are guided; None: all
    interval: Sequence[float] | None = None  # of guided times, t=1 being noise; None: all
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
    reasons: tuple[Reason, ...] = ()  # why not
    notes: Sequence[str] = ()  # what else to know


# ------------------------------------------------------------------------------------------------------------- reading


def read_result(path: str | Path) -> Row:
    """A result of ``dit-moe eval``: its file, or the folder that holds it as metrics.json.

    What it does not say stays open. Raises ValueError if there is no such file, or if it is of another kind.
    """
    path, file = Path(path), result_file(path)
    if not file.is_file():
        raise ValueError(f"{missing(file)}; name a result of dit-moe eval --out FILE.json, or its folder")
    remedy = "name a result of dit-moe eval, or evaluate again"
    tree = load(file, remedy)
    if not isinstance(tree, dict) or not isinstance(tree.get("provenance"), dict):
        raise ValueError(f"{file} is no result of dit-moe eval, which says in `provenance` how it was made; name one")
    try:
        return _row(Report.from_json(tree), source=str(path))
    except ConfigError as error:
        raise ValueError(f"{file}: {error}; {remedy}") from None


def result_file(path: str | Path) -> Path:
    """Where the result is that `path` names."""
    return Path(path) / FILE if Path(path).is_dir() else Path(path)


def _row(report: Report, source: str) -> Row:
    facts = report.provenance
    # The facts of an npz are in the file beside it.
    made = [{**each, **convert(Tree, each.get("sample", {}), "sample")} for each in facts.samples]
    verified = facts.extractor.get("is_fid") is True
    space = "" if verified else str(facts.extractor.get("name") or "unknown features")
    counts = [each.n_reference for each in report.distances.values() if each.n_reference is not None]
    caveat = convert(str | None, facts.extractor.get("caveat"), "provenance.extractor.caveat")
    sample = "experiment.sample"
    interval = _shared(made, f"{sample}.guidance.interval", tuple[float, float])
    router, model = _shared(made, "experiment.model.moe.router.name"), _shared(made, "experiment.model", Any)
    return Row(
        source=source,
        name=_short(convert(str | None, made[0].get("name"), "name") if made else None) or _short(source),
        model=_shared(made, "experiment.model.name") or _shared(made, "model"),
        router=router if router is not None else "dense" if model else None,
        parameters=_shared(made, "parameters", NonNegative),
        active_parameters=_shared(made, "active_parameters", NonNegative),
        active_experts=_active_experts(report, made),
        steps=_shared(made, "step", Count),
        batch=_shared(made, "experiment.train.batch_size", Count),
        objective=_shared(made, "experiment.objective.name"),
        sampler=_joined(_shared(made, f"{sample}.sampler.name"), _shared(made, f"{sample}.sampler.steps", Count)),
        evaluations=_shared(made, "evaluations", Count),
        guidance=_shared(made, f"{sample}.guidance.scale", float),
        channels=_shared(made, f"{sample}.guidance.channels", Count),
        interval=None if interval in (None, [0, 1]) else (interval[0], interval[1]),
        weights=_shared(made, "weights") or _shared(made, f"{sample}.weights"),
        sampling_recipe=_shared(made, "recipe") or convert(str | None, facts.asked.get("sampling"), "sampling"),
        image_size=_side(made),
        n=facts.n_gen,
        n_reference=counts[0] if counts else facts.n_ref_statistics,
        n_reference_images=facts.n_ref_images,
        seeds=len(facts.samples) or None,
        space=space,
        values=_values(report, verified),
        measured=tuple(
            key
            for key, number in report.numbers.items()
            if isinstance(number, Distance | Value) and not is_spread(key, space) and (verified or not _is_fid(key))
        ),
        comparable=facts.comparable,
        reasons=tuple(facts.reasons),
        notes=() if caveat is None else (f"{space}: {caveat}",),
    )


def _shared(made: Sequence[Tree], path: str, kind: Any = str) -> Any:
    """A dotted setting of how each seed's images were made: None where one does not have it, or where two differ.

    ConfigError if it is of another `kind`.
    """
    found = []
    for value in made:
        each: Any = value
        for key in path.split("."):
            each = each.get(key) if isinstance(each, Mapping) else None
        convert(kind | None, each, path)
        found.append(each)
    return found[0] if found and all(each == found[0] for each in found) else None


def _joined(*parts: object) -> str | None:
    return " ".join(str(part) for part in parts if part is not None) or None


def _short(name: str | None) -> str | None:
    """The last two parts of a path, or all of another name."""
    return "/".join(Path(name).parts[-2:]).strip("/") if name else None


def _side(made: Sequence[Tree]) -> int | None:
    """Of the images that were compared. Older results do not say it, but of models of pixels it is known."""
    shape = _shared(made, "image_shape", tuple[Size, Size, Size])
    if shape is None and _shared(made, "experiment.first_stage.name") == "identity":
        return _shared(made, "experiment.model.input_size", Size)
    return shape[-1] if shape and shape[1] == shape[2] else None


def _active_experts(report: Report, made: Sequence[Tree]) -> float | None:
    """Of the training, as quickstart adds it, or else the mean of what was counted when the images were made."""
    active = report.more.get("active_experts")
    active = active.get("mean") if isinstance(active, dict) else active
    counted = [each["active_experts"] for each in made if each.get("active_experts") is not None]
    for each in (active, *counted):
        convert(NonNegative | None, each, "active_experts")
    if active is None and counted and len(counted) == len(made):
        active = sum(counted) / len(counted)
    return active


def _is_fid(key: str) -> bool:
    return key.split("_")[0] in ("fid", "sfid")


def _values(report: Report, verified: bool) -> dict[str, float]:
    """All numbers of a report, without what is called FID but was not computed with the verified Inception."""
    flat = {name.replace(".generated", "").replace(".", "_"): value for name, value in report.flat().items()}
    flat |= {key: value for key, value in report.more.items() if type(value) in (int, float)}
    return {key: value for key, value in flat.items() if verified or not _is_fid(key)}


def published_rows() -> list[Row]:
    """The rows of published.yaml, each with what its paper says of all its rows."""
    rows = []
    for paper in yaml_text.read(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")):
        of_all = {key: value for key, value in paper.items() if key != "rows"}
        for own in paper["rows"]:
            found = {**of_all, **own}
            values = {name: found.pop(name) for name in PUBLISHED_VALUES if name in found}
            rows.append(Row(**found, n=50_000, seeds=1, values=values, published=True))
    return rows
