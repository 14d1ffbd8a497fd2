"""The numbers of a report as a table on stderr, generated images beside real ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

SUFFIXES = ("_std", "_heldout", "_reconstruction")  # of keys that belong to another, or that are spreads within a set
COLUMNS = {
    "generated": "generated",
    "generated_std": "± over seeds",
    "floor": "held-out",
    "ratio": "generated / held-out",
    "floor_estimate": "expected floor",
}
RECONSTRUCTED = "  reconstructed"  # held-out images, encoded and decoded
ARROWS = {"lower": " ↓", "higher": " ↑"}
SHOWN = 2  # reasons


def print_table(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the report of `evaluate`: a row for each number, and the columns that any of them has."""
    facts = report["provenance"]
    table = Table(title=_title(facts), pad_edge=False)  # every cell fits 80 columns
    rows = _rows(report)
    columns = [name for name in COLUMNS if any(row.get(name) is not None for _, row in rows)]
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(COLUMNS[name], justify="right")
    for label, row in rows:
        table.add_row(label, *(_show(row.get(name)) for name in columns))
    console = console or Console(stderr=True)
    console.print(table)
    console.print(_comparability(facts), highlight=False, markup=False)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False)


def _title(facts: Mapping[str, Any]) -> str:
    """What was compared with what, with the counts that are known."""
    seeds, n = len(facts["samples"]), facts["n_gen"]
    images = "an unstated number of" if not n else f"{seeds} × {n}" if seeds > 1 else str(n)
    of, among = facts.get("n_ref_statistics"), facts.get("n_ref_images")
    counts = [f"statistics of {of}"] if of is not None and of != among else []
    counts += [f"{among} images"] if among else []
    known = f" ({', '.join(counts)})" if counts else ""
    return f"{images} images against {facts['reference']['name']}{known}, features of {facts['extractor']['name']}"


def _comparability(facts: Mapping[str, Any]) -> str:
    if facts.get("comparable_to_published"):
        return "comparable to published numbers"
    reasons = facts.get("not_comparable_because") or []
    more = [f"and {len(reasons) - SHOWN} more in the result"] if len(reasons) > SHOWN else []
    return "not comparable to published FIDs" + (": " if reasons else "") + "; ".join([*reasons[:SHOWN], *more])


def _rows(report: Mapping[str, Any]) -> list[tuple[str, dict[str, float | None]]]:
    space, better = report["provenance"]["extractor"]["name"], report["provenance"].get("better") or {}
    rows: list[tuple[str, dict[str, float | None]]] = []
    for key, value in report.items():
        name = key.removesuffix(f"_{space}")
        label = name + ARROWS.get(better.get(key, ""), "")
        if isinstance(value, dict) and "generated" in value:
            rows.append((label, value))
            if value.get("reconstruction") is not None:
                again = {"generated": value["reconstruction"], "ratio": value.get("reconstruction_ratio")}
                rows.append((RECONSTRUCTED, {"floor": value.get("floor"), **again}))
        elif f"{key}_heldout" in report and not name.endswith(SUFFIXES):
            real, std = report[f"{key}_heldout"], report.get(f"{key}_std")
            rows.append((label, {"generated": value, "generated_std": std, "floor": real}))
    return rows


def _show(value: float | None) -> str:
    if value is None:
        return ""
    size = abs(value)  # 9 characters at most
    return f"{value:.0f}" if 1e4 <= size < 1e8 else f"{value:.4g}" if 1e-3 <= size < 1e4 or not size else f"{value:.2e}"
