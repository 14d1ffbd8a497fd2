"""Many results in one table, beside the published ones: Markdown to read, CSV to compute with."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
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
    n: int | None = None
    n_reference: int | None = None
    seeds: int | None = None
    space: str = ""  # of the features; empty: the verified Inception's, those of published numbers
    values: Mapping[str, float] = field(default_factory=dict)
    comparable: bool = False
    notes: tuple[str, ...] = ()  # why not, or what to know


# ------------------------------------------------------------------------------------------------------------- reading


def read_result(path: str | Path) -> Row:
    """A result of ``dit-moe eval``: its file, or the folder that holds it as metrics.json.

    What it does not say stays open. Raises ValueError if there is no such file, or if it is of another kind.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist; name a result of dit-moe eval --out FILE.json, or its folder")
    try:
        report = json.loads(file.read_text())
    except ValueError:
        report = None
    if not isinstance(report, dict) or not isinstance(report.get("provenance"), dict):
        raise ValueError(f"{file} is no result of dit-moe eval, which says in `provenance` how it was made; name one")
    return _row(report, source=str(path))


def _row(report: Report, source: str) -> Row:
    facts = report["provenance"]
    samples = [each for each in _list(facts.get("samples")) if isinstance(each, dict)]
    made = [{**each, **_dict(each.get("sample"))} for each in samples]  # an npz's are in the file beside it
    shared = _Shared(made)
    extractor = facts.get("extractor")
    extractor = extractor if isinstance(extractor, dict) else {"name": extractor}
    space = "" if extractor.get("is_fid") is True else str(extractor.get("name") or "unknown features")
    reasons = _list(facts.get("not_comparable_because"))
    comparable = facts.get("comparable_to_published") is True
    guided = shared("experiment", "sample", "guidance")
    interval = _dict(guided).get("interval")
    router = shared("experiment", "model", "moe", "router")
    return Row(
        source=source,
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
        n=facts.get("n_gen"),
        n_reference=facts.get("n_ref"),
        seeds=len(_list(facts.get("samples"))) or None,
        space=space,
        values=_numbers(report, space),
        comparable=comparable,
        notes=tuple(reasons) if comparable or reasons else ("the result does not say whether it is comparable",),
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
        comparable=True,
        notes=() if baseline.note is None else (baseline.note,),
    )


# ------------------------------------------------------------------------------------------------------------ Markdown


def to_markdown(rows: Sequence[Row]) -> str:
    """A table with one line per row, in their order, and footnotes on what is not comparable, and why.

    Each feature space has columns of its own. Columns that would be empty are left out.
    """
    notes: list[str] = []  # each but once
    for row in rows:
        notes += [note for note in row.notes if note not in notes]
    columns = [
        *_settings(),
        *_measured(rows),
        ("comparable", lambda row: _mark(row, notes)),
        ("source", lambda row: row.source),
    ]
    cells = [[show(row).replace("|", "\\|") for row in rows] for _, show in columns]
    kept = [(title, column) for (title, _), column in zip(columns, cells, strict=True) if any(column)]
    widths = [max(len(title), *map(len, column)) for title, column in kept]
    numeric = [all(not cell or cell[0] in "≈0123456789" for cell in column) for _, column in kept]
    lines = [
        [title for title, _ in kept],
        ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numeric, strict=True)],
        *[[column[i] or "–" for _, column in kept] for i in range(len(rows))],
    ]
    text = "".join(f"| {' | '.join(_padded(line, widths, numeric))} |\n" for line in lines)
    footnotes = "".join(f"{_superscript(i)} {note}  \n" for i, note in enumerate(notes, start=1))
    return text + ("\n" + footnotes if notes else "")


Column = tuple[str, Callable[[Row], str]]


def _settings() -> list[Column]:
    return [
        ("model", lambda row: row.model or ""),
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
    ]


def _measured(rows: Sequence[Row]) -> list[Column]:
    """The numbers' columns, those of published numbers first."""
    spaces = sorted({row.space: None for row in rows}, key=bool)
    return [column for space in spaces for column in _columns_of(space)]


def _columns_of(space: str) -> list[Column]:
    ending, of = (f"_{space}", f", {space}") if space else ("", "")
    distance, spatial = (f"fd{ending}", f"sfd{ending}") if space else ("fid", "sfid")

    def column(title: str, name: str, decimals: int) -> Column:
        def show(row: Row) -> str:
            if row.space != space:
                return ""
            value, std = (_decimals(row.values.get(each), decimals) for each in (name, f"{name}_std"))
            return f"{value} ± {std}" if value and std else value

        return f"{title}{of}", show

    def floor(row: Row) -> str:
        measured, estimate = (row.values.get(f"{distance}_floor{each}") for each in ("", "_estimate"))
        if row.space != space:
            return ""
        return _decimals(measured, 2) or (f"≈ {estimate:.2f}" if estimate is not None else "")

    return [
        column("FD" if space else "FID", distance, 2),
        ("its floor", floor),
        column("sFD" if space else "sFID", spatial, 2),
        column("IS", f"inception_score{ending}", 1),
        column("precision", f"precision{ending}", 3),
        column("recall", f"recall{ending}", 3),
        column("KID", f"kid{ending}", 5),
    ]


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


def _mark(row: Row, notes: Sequence[str]) -> str:
    numbers = sorted(notes.index(note) + 1 for note in row.notes)
    return ("✓" if row.comparable else "✗") + " ".join(map(_superscript, numbers))


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _plain(number: float | None) -> str:
    return "" if number is None else f"{number:g}"


def _decimals(number: float | None, decimals: int) -> str:
    return "" if number is None else f"{number:.{decimals}f}"


def _spaced(number: int | None) -> str:
    return "" if number is None else f"{number:,}".replace(",", " ")


def _millions(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.{0 if number >= 1e7 else 2}f} M"


def _thousands(number: int | None) -> str:
    if number is None or number < 10_000:
        return _plain(number)
    return f"{number / 1e6:g} M" if number >= 1_000_000 else f"{number / 1e3:g} K"


def _padded(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> list[str]:
    padded = zip(cells, widths, numeric, strict=True)
    return [cell.rjust(width) if right else cell.ljust(width) for cell, width, right in padded]


# ----------------------------------------------------------------------------------------------------------------- CSV


def to_csv(rows: Sequence[Row]) -> str:
    """All that is known, unrounded, one line per row; a cell is empty where it is not."""
    settings = [each.name for each in fields(Row) if each.name not in ("values", "notes", "comparable", "interval")]
    numbers = list(dict.fromkeys(name for row in rows for name in row.values))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*settings, "interval_first", "interval_last", *numbers, "comparable", "notes"])
    for row in rows:
        known = [getattr(row, name) for name in settings]
        interval = row.interval or (None, None)
        values = [row.values.get(name) for name in numbers]
        writer.writerow([*known, *interval, *values, row.comparable, "; ".join(row.notes)])
    return text.getvalue()
