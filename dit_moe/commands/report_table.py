"""The numbers of a report as a table on stderr, generated images beside real ones."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

SUFFIXES = ("_std", "_heldout", "_reconstruction")


def print_table(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the report of `evaluate`."""
    facts = report["provenance"]
    seeds = len(facts["samples"])
    images = f"{seeds} × {facts['n_gen']}" if seeds > 1 else str(facts["n_gen"] or "statistics of unstated")
    reference = facts["reference"]["name"]
    against = f"{facts['n_ref']} of {reference}" if facts["n_ref"] else reference
    comparable, space = facts.get("comparable_to_published"), facts["extractor"]["name"]
    table = Table(
        title=f"{images} images against {against}, features of {space}",
        caption="comparable to published numbers" if comparable else "not comparable to published FIDs",
    )
    for column in ("", "generated", "± std", "held-out", "ratio", "expected floor"):
        table.add_column(column, justify="right" if column else "left")
    for name, value in report.items():
        if isinstance(value, dict) and "generated" in value:
            columns = ("generated", "generated_std", "floor", "ratio", "floor_estimate")
            table.add_row(name, *(_show(value[column]) for column in columns))
            if value["reconstruction"] is not None:
                shown = (value["reconstruction"], None, value["floor"], value["reconstruction_ratio"], None)
                table.add_row("  of held-out images encoded and decoded", *map(_show, shown))
        elif f"{name}_heldout" in report and not name.endswith(SUFFIXES):
            table.add_row(
                name.removesuffix(f"_{space}"),
                *map(_show, (value, report[f"{name}_std"], report[f"{name}_heldout"])),
                "",
                "",
            )
    console = console or Console(stderr=True)
    console.print(table)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False)


def _show(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
