"""A study as a table: Markdown to read, CSV to compute with."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dit_moe.rounding import rounded
from dit_moe.studies.notes import notes, several, signed
from dit_moe.studies.statistics import CONFIDENCE, Paired, Scores, Spread, by_objective, scores
from dit_moe.tables import markdown_table

# ------------------------------------------------------------------------------------------------------------ Markdown

Column = tuple[str, Callable[[Scores], str]]
MOST = 6  # decimals
POWERS = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}


def to_markdown(results: Mapping[str, Any]) -> str:
    """One table for each objective, whose losses alone can be compared, and notes on how the numbers came about.

    Columns that would be empty are left out. A difference is bold where its interval excludes 0.
    """
    groups = by_objective(results)
    tables = []
    for objective, rows in groups.items():
        heading = f"## Objective: {objective}\n\n" if len(groups) > 1 else ""
        columns = ((title, [show(row) for row in rows]) for title, show in _columns(results, rows))
        tables.append(heading + markdown_table(columns))
    everything = [each for rows in groups.values() for each in rows]
    said = "".join(f"- {note}\n" for note in notes(results, everything))
    return "\n".join([f"# {results['title']}\n", *tables, said])


def _columns(results: Mapping[str, Any], rows: Sequence[Scores]) -> list[Column]:
    loss, metric, unit = results["loss"], results["metric"], results["unit"]
    compared = {row.baseline["name"]: row.baseline["label"] for row in rows if not row.is_baseline}
    to = next(iter(compared.values())) if len(compared) == 1 else "its baseline"
    digits = _paired_decimals([row.difference for row in rows if row.difference])
    interval = f"difference to {to} [{100 * CONFIDENCE:g} % CI]"
    prefix, power = flops_unit(rows)
    columns = [
        ("variant", lambda row: row.label),
        ("experts", _wanted),
        (" ".join(filter(None, [loss["label"], f"({loss['unit']})" * bool(loss["unit"])])), _spreads(rows, "loss")),
        (interval, lambda row: _difference(row, digits)),
        ("%", lambda row: "" if row.difference is None else signed(100 * row.difference.relative, 2)),
    ]
    if len(compared) > 1:
        columns.insert(3, ("baseline", lambda row: "itself" if row.is_baseline else row.baseline["label"]))
    if metric is not None:
        arrow = {"lower": " ↓", "higher": " ↑"}.get(metric["better"], "")
        columns.append((metric["label"] + arrow, _spreads(rows, "metric")))
    return [
        *columns,
        ("active, held-out", lambda row: _show(row.active, 3)),
        ("active, training", lambda row: _show(row.training, 3)),
        (f"{prefix}FLOPs per {unit}", lambda row: _show(row.flops, 2, power)),
        ("time per step", lambda row: "" if row.slowdown is None else f"{rounded(row.slowdown, 2)}×"),
        ("seeds", lambda row: str(len(row.seeds))),
    ]


def flops_unit(rows: Iterable[Scores]) -> tuple[str, float]:
    """SI prefix and its factor, in which the cheapest variant's FLOPs are at least 1."""
    least = min((row.flops.mean for row in rows if row.flops is not None), default=1.0)
    return next(((prefix, power) for prefix, power in POWERS.items() if least >= power), ("", 1.0))


def _wanted(row: Scores) -> str:
    target, experts = row.variant["target"], row.variant["experts"]
    if experts is None:
        return ""
    return f"{target:g} of {experts}" if target is not None else f"of {experts}"


def _decimals(spreads: Iterable[Spread | None]) -> int:
    """That show two digits of the smallest standard deviation, and at least four of the largest mean."""
    known = [each for each in spreads if each is not None]
    stds = [each.std for each in known if each.std]
    largest = max((abs(each.mean) for each in known), default=1.0) or 1.0
    of_mean, of_std = _digits(largest, 4), _digits(min(stds), 2) if stds else 0
    return min(max(of_mean, of_std), MOST)


def _paired_decimals(pairs: Sequence[Paired]) -> int:
    """That show two digits of the narrowest interval's half, or where there is none, of the smallest difference."""
    halves = [(each.high - each.low) / 2 for each in pairs if each.low is not None and each.high is not None]
    shown = [size for size in halves or [abs(each.mean) for each in pairs] if size]
    return min(_digits(min(shown), 2), MOST) if shown else 0


def _digits(size: float, digits: int) -> int:
    """Decimals with which so many digits of a number of this size are seen."""
    return max(digits - 1 - math.floor(math.log10(size)), 0)


def _spreads(rows: Sequence[Scores], name: str) -> Callable[[Scores], str]:
    decimals = _decimals(getattr(row, name) for row in rows)
    return lambda row: _show(getattr(row, name), decimals)


def _show(spread: Spread | None, decimals: int, power: float = 1.0) -> str:
    if spread is None:
        return ""
    mean = f"{spread.mean / power:.{decimals}f}"
    return f"{mean} ± {rounded(spread.std / power, decimals)}" if spread.std else mean


def _difference(row: Scores, decimals: int) -> str:
    paired = row.difference
    if paired is None:
        return ""
    pairs = f" ({several(paired.n, 'pair')})" if paired.n < len(row.seeds) else ""
    mean = signed(paired.mean, decimals)
    if paired.low is None or paired.high is None:
        return mean + pairs
    mean = f"**{mean}**" if paired.excludes_zero else mean
    return f"{mean} [{signed(paired.low, decimals)}, {signed(paired.high, decimals)}]{pairs}"


# ----------------------------------------------------------------------------------------------------------------- CSV

FACTS = ("name", "label", "objective", "baseline", "router", "controlled", "experts", "target")
SIZES = ("parameters", "active_parameters", "seconds_per_step")
SPREADS = ("loss", "metric", "active", "training", "flops")


def to_csv(results: Mapping[str, Any]) -> str:
    """All numbers over seeds, unrounded, one line per variant; a cell is empty where a number is not known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    titles = {"metric": (results["metric"] or {}).get("name", "metric"), "training": "training_active"}
    spreads = [f"{titles.get(name, name)}{end}" for name in SPREADS for end in ("", "_std")]
    paired = ("difference", "difference_low", "difference_high", "difference_pairs")
    writer.writerow([*FACTS, "seeds", *spreads, *paired, *SIZES, "relative_time"])
    for row in scores(results):
        known = [(each.mean, each.std) if each else (None, None) for each in (getattr(row, name) for name in SPREADS)]
        difference = row.difference
        pair = (difference.mean, difference.low, difference.high, difference.n) if difference else (None,) * 4
        facts, sizes = ([row.variant[name] for name in names] for names in (FACTS, SIZES))
        seeds = " ".join(map(str, row.seeds))
        writer.writerow([*facts, seeds, *(number for each in known for number in each), *pair, *sizes, row.slowdown])
    return text.getvalue()
