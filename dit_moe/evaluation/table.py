"""Results of evaluations beside published ones: in Markdown to read, or CSV to compute with."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from dit_moe import yaml_text
from dit_moe.config import ConfigError, Tree, convert
from dit_moe.evaluation.comparability import Reason
from dit_moe.evaluation.report import Distance, Report, Value, is_spread
from dit_moe.files import missing, require_output, write_atomically
from dit_moe.formatting import markdown_table, rounded, spaced
from dit_moe.json_files import Count, NonNegative, Size, load
from dit_moe.locks import exclusive

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


# ------------------------------------------------------------------------------------------------------ many results

PUBLISHED: dict[str, Callable[[Row], bool]] = {  # choices of --published
    "all": lambda row: True,
    "256": lambda row: row.image_size == 256,
    "512": lambda row: row.image_size == 512,
    "none": lambda row: False,
}


def make_table(results: Sequence[Path], published: str, out: Path | None = None, csv_file: Path | None = None) -> str:
    """The Markdown table of results and published rows, and the files that hold it as Markdown and as CSV.

    Raises ValueError for bad input, before anything is written.
    """
    for option, path, ending in (("--out", out, ".md"), ("--csv", csv_file, ".csv")):
        if path is None:
            continue
        require_output(path, option, ending, "table")
        for result in results:
            if path.resolve() == result_file(result).resolve():
                raise ValueError(f"{option} {path} would overwrite the RUN {result}; name another file")
    rows = [read_result(path) for path in results] + [row for row in published_rows() if PUBLISHED[published](row)]
    if not rows:
        raise ValueError("no rows; name at least one RUN, or leave out --published none")
    if out is not None and csv_file is not None and out.resolve() == csv_file.resolve():
        raise ValueError(f"--out {out} and --csv {csv_file} are one file; name two")
    markdown = to_markdown(rows)
    files = {path: text for path, text in ((out, markdown), (csv_file, to_csv(rows))) if path is not None}
    with ExitStack() as held:  # so that the two are of one call
        for path in files:
            held.enter_context(exclusive(path.parent, path.name))
        for path, text in files.items():
            write_atomically(path, text)
    return markdown


# ------------------------------------------------------------------------------------------------------------ Markdown


def to_markdown(rows: Sequence[Row]) -> str:
    """A table with one line per row, in their order, and footnotes on what is not comparable, and why.

    Each feature space has columns of its own. Columns that would be empty are left out. Reasons that differ but in the
    row's own counts share a footnote.
    """
    notes: list[str] = list(dict.fromkeys(note for row in rows for note in _notes(row)))  # each but once
    columns = [
        *_settings(),
        *_numbers(rows),
        ("comparable", lambda row: _mark(row, notes)),
        ("source", lambda row: row.source),
    ]
    text = markdown_table((title, [show(row) for row in rows]) for title, show in columns)
    footnotes = "".join(f"{_superscript(i)} {note}  \n" for i, note in enumerate(notes, start=1))
    return text + ("\n" + footnotes if notes else "")


Column = tuple[str, Callable[[Row], str]]


def _settings() -> list[Column]:
    return [
        ("model", lambda row: row.model or row.name or row.source),
        ("px", lambda row: _plain(row.image_size)),
        ("router", lambda row: row.router or ""),
        ("params", lambda row: _millions(row.parameters)),
        ("active params", lambda row: _millions(row.active_parameters)),
        ("active experts", lambda row: _decimals(row.active_experts, 2)),
        ("steps × batch", _training),
        ("objective", lambda row: row.objective or ""),
        ("sampler", lambda row: row.sampler or ""),
        ("NFE", lambda row: _plain(row.evaluations)),
        ("cfg", _guidance),
        ("n", lambda row: _spaced(row.n) + (f" × {row.seeds}" if row.seeds and row.seeds > 1 else "")),
        ("n reference", _reference),
    ]


TITLES = {"fid": "FID", "sfid": "sFID", "fd": "FD", "sfd": "sFD", "inception_score": "IS", "kid": "KID"}
DECIMALS = {"fid": 2, "sfid": 2, "fd": 2, "sfd": 2, "inception_score": 1, "precision": 3, "recall": 3}
ACCURACY = "class_accuracy"  # which is of no feature space


def _numbers(rows: Sequence[Row]) -> list[Column]:
    """The verified Inception's first, as published numbers are, then other feature spaces', last those of no space."""
    columns: dict[str, Callable[[Row], str]] = {}
    for space in sorted({row.space: None for row in rows}, key=bool):
        ending, of = (f"_{space}", f", {space}") if space else ("", "")
        distance, spatial = ("fd", "sfd") if space else ("fid", "sfid")
        measured = [name for row in rows if row.space == space for name in row.measured if name.endswith(ending)]
        known = [distance, spatial, "inception_score", "precision", "recall", "kid"]
        for name in dict.fromkeys([*known, *(each.removesuffix(ending) for each in measured if each != ACCURACY)]):
            title = TITLES.get(name, name.replace("_", " "))
            columns[title + of] = partial(_with_std, name=name + ending, decimals=DECIMALS.get(name, 0))
            if name == distance:
                columns[f"its floor{of}"] = partial(_floor, name=name + ending)
    bare = [name for row in rows for name in row.measured if row.space and not name.endswith(f"_{row.space}")]
    for name in dict.fromkeys([ACCURACY, *bare]):
        columns.setdefault(name.replace("_", " "), partial(_with_std, name=name, decimals=3 if name == ACCURACY else 0))
    return list(columns.items())


def _floor(row: Row, name: str) -> str:
    """Measured, or else estimated."""
    measured, estimate = row.values.get(f"{name}_floor"), row.values.get(f"{name}_floor_estimate")
    return _decimals(measured, 2) or (f"≈ {_decimals(estimate, 2)}" if estimate is not None else "")


def _with_std(row: Row, name: str, decimals: int) -> str:
    """With so many decimals, but 3 significant digits at least."""
    number, std = row.values.get(name), row.values.get(f"{name}_std")
    value, spread = _decimals(number, decimals), _decimals(std, decimals, digits=2)
    return f"{value} ± {spread}" if value and spread else value


def _reference(row: Row) -> str:
    images = row.n_reference_images
    apart = f"{_spaced(images)} images" if images is not None and images != row.n_reference else ""
    return ", ".join(filter(None, (_spaced(row.n_reference), apart)))


def _training(row: Row) -> str:
    return (_thousands(row.steps) or "–") + f" × {row.batch}" if row.batch else _thousands(row.steps)


def _guidance(row: Row) -> str:
    if row.guidance is None:
        return ""
    parts = [f"{row.guidance:g}"]
    if row.guidance != 1:
        parts += [f"{row.channels} channels"] if row.channels is not None else []
        parts += [f"t {row.interval[0]:g}…{row.interval[1]:g}"] if row.interval is not None else []
    return ", ".join(parts)


def _notes(row: Row) -> list[str]:
    return [*(reason.general for reason in row.reasons), *row.notes]


def _mark(row: Row, notes: Sequence[str]) -> str:
    numbers = sorted({notes.index(note) + 1 for note in _notes(row)})
    standing = "published" if row.published else "✓" if row.comparable else "✗"
    return standing + " ".join(map(_superscript, numbers))


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _plain(number: float | None) -> str:
    return "" if number is None else f"{number:g}"


def _decimals(number: float | None, decimals: int, digits: int = 3) -> str:
    return "" if number is None else rounded(number, decimals, digits)


def _spaced(number: int | None) -> str:
    return "" if number is None else spaced(number)


def _millions(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{rounded(number / 1e6, 0 if number >= 1e7 else 2, 2)} M"


def _thousands(number: int | None) -> str:
    if number is None or number < 10_000:
        return _plain(number)
    return f"{number / 1e6:g} M" if number >= 1_000_000 else f"{number / 1e3:g} K"


# ----------------------------------------------------------------------------------------------------------------- CSV


APART = ("interval", "values", "measured", "published", "comparable", "reasons", "notes")


def to_csv(rows: Sequence[Row]) -> str:
    """All that is known, unrounded, one line per row; a cell is empty where it is not."""
    settings = [each.name for each in fields(Row) if each.name not in APART]
    numbers = list(dict.fromkeys(name for row in rows for name in row.values))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*settings, "interval_first", "interval_last", *numbers, "comparable", "reasons", "notes"])
    for row in rows:
        known = [getattr(row, name) for name in settings]
        interval = row.interval or (None, None)
        values = [row.values.get(name) for name in numbers]
        standing = "published" if row.published else row.comparable
        writer.writerow(
            [
                *known,
                *interval,
                *values,
                standing,
                "; ".join(reason.text for reason in row.reasons),
                "; ".join(row.notes),
            ]
        )
    return text.getvalue()
