"""Results of evaluations beside published ones: in Markdown to read, or CSV to compute with."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from pathlib import Path

from dit_moe.evaluation.results import Row, published_rows, read_result, result_file
from dit_moe.files import require_output, write_atomically
from dit_moe.formatting import markdown_table, rounded, spaced
from dit_moe.locks import exclusive

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
