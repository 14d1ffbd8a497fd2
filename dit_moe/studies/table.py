"""A study as a table: Markdown to read, CSV to compute with."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dit_moe.formatting import markdown_table, rounded
from dit_moe.studies.results import StudyResults
from dit_moe.studies.statistics import CONFIDENCE, Paired, Spread, VariantSummary, by_objective, summaries

# ------------------------------------------------------------------------------------------------------------ Markdown

Column = tuple[str, Callable[[VariantSummary], str]]
MOST = 6  # decimals
PREFIXES = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}


def to_markdown(results: StudyResults) -> str:
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
    return "\n".join([f"# {results.title}\n", *tables, said])


def _columns(results: StudyResults, rows: Sequence[VariantSummary]) -> list[Column]:
    loss, metric, unit = results.loss, results.metric, results.unit
    compared = {row.baseline.name: row.baseline.label for row in rows if not row.is_baseline}
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
        columns.insert(3, ("baseline", lambda row: "itself" if row.is_baseline else row.baseline.label))
    if metric is not None:
        arrow = {"lower": " ↓", "higher": " ↑"}.get(metric["better"], "")
        columns.append((metric["label"] + arrow, _spreads(rows, "metric")))
    return [
        *columns,
        ("active, held-out", lambda row: _show(row.active, 3)),
        ("active, training", lambda row: _show(row.training, 3)),
        (f"{prefix}FLOPs per {unit}", lambda row: _show(row.flops, 2, power)),
        ("balance", lambda row: _show(row.balance, 2)),
        ("memory, MiB", lambda row: "" if row.memory is None else rounded(row.memory.mean / 2**20, 0)),
        ("time per step", lambda row: "" if row.slowdown is None else f"{rounded(row.slowdown, 2)}×"),
        ("seeds", lambda row: str(len(row.seeds))),
    ]


def flops_unit(rows: Iterable[VariantSummary]) -> tuple[str, float]:
    """SI prefix and its factor, in which the cheapest variant's FLOPs are at least 1."""
    return si_prefix(min((row.flops.mean for row in rows if row.flops is not None), default=1.0))


def si_prefix(number: float) -> tuple[str, float]:
    """The largest SI prefix, and its factor, in which a number is at least 1."""
    return next(((prefix, power) for prefix, power in PREFIXES.items() if number >= power), ("", 1.0))


def _wanted(row: VariantSummary) -> str:
    target, experts = row.variant.target, row.variant.experts
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


def _spreads(rows: Sequence[VariantSummary], name: str) -> Callable[[VariantSummary], str]:
    decimals = _decimals(getattr(row, name) for row in rows)
    return lambda row: _show(getattr(row, name), decimals)


def _show(spread: Spread | None, decimals: int, power: float = 1.0) -> str:
    if spread is None:
        return ""
    mean = f"{spread.mean / power:.{decimals}f}"
    return f"{mean} ± {rounded(spread.std / power, decimals)}" if spread.std else mean


def _difference(row: VariantSummary, decimals: int) -> str:
    paired = row.difference
    if paired is None:
        return ""
    pairs = f" ({several(paired.n, 'pair')})" if paired.n < len(row.seeds) else ""
    mean = signed(paired.mean, decimals)
    if paired.low is None or paired.high is None:
        return mean + pairs
    mean = f"**{mean}**" if paired.excludes_zero else mean
    return f"{mean} [{signed(paired.low, decimals)}, {signed(paired.high, decimals)}]{pairs}"


# --------------------------------------------------------------------------------------------------------------- notes


def notes(results: StudyResults, rows: Sequence[VariantSummary]) -> list[str]:
    """A sentence or two each: what was run, on what, what the numbers are, and what is missing."""
    found = [_missing(results), _seeds(rows), _no_log(rows), _loss(results), _intervals(results, rows)]
    found += [_search(results, rows), _control(rows), _drift(rows), _flops(results, rows), _balance_and_memory(rows)]
    found += [_time(results, rows), *_made(rows)]
    return [note for note in found if note]


def _missing(results: StudyResults) -> str:
    if results.finished and not results.missing:
        return ""
    labels = {row.variant.name: row.label_of_all for row in summaries(results)}
    seeds: dict[str, list[str]] = {}
    for name, seed in results.missing:
        seeds.setdefault(name, []).append(str(seed))
    what = "; ".join(f"{labels.get(name, name)} with seed {', '.join(which)}" for name, which in seeds.items())
    return f"**Not finished.** Missing: {what or 'scores'}. Numbers are of the runs that are there."


def _seeds(rows: Sequence[VariantSummary]) -> str:
    steps = sorted({run.step for row in rows for run in row.runs})
    if not steps:
        return "No run is there yet."
    seeds = sorted({seed for row in rows for seed in row.seeds})
    trained = f"{steps[0]:,} steps" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,} steps, **not all as long**"
    return f"Trained for {trained}, seeds {', '.join(map(str, seeds))}; ± is the standard deviation over seeds (n − 1)."


def _no_log(rows: Sequence[VariantSummary]) -> str:
    folders = [run.folder for row in rows for run in row.runs if not run.curves["step"]]
    return f"**No log.jsonl**, and so nothing of the training, in {', '.join(folders)}." if folders else ""


def _loss(results: StudyResults) -> str:
    settings = ", ".join(f"{name} {_plain(value)}" for name, value in (results.settings["heldout"] or {}).items())
    label, given = results.loss["label"], f" ({settings})" * bool(settings)
    same = "held-out text" if results.unit == "token" else "held-out images, times and noise"
    return f"{label[:1].upper() + label[1:]}: the same {same} for all runs{given}."


def _intervals(results: StudyResults, rows: Sequence[VariantSummary]) -> str:
    bounded = [row.difference for row in rows if row.difference is not None and row.difference.low is not None]
    if not any(row.difference for row in rows):
        return ""
    if not bounded:
        return "Differences are of runs with the same seed; one seed has no interval."
    clear = sum(each.excludes_zero for each in bounded)
    tested = "text" if results.unit == "token" else "images, times and noise"
    return (
        f"Differences are of runs with the same seed, which share initial weights, data and noise; below 0 is better. "
        f"Intervals are Student's, for one comparison each, and tell of other training seeds with these held-out "
        f"{tested}, not of others; {clear} of {len(bounded)} exclude 0 (bold)."
    )


def _search(results: StudyResults, rows: Sequence[VariantSummary]) -> str:
    if results.search is None:
        return ""
    search, chosen = results.search, results.search["chosen"]
    tried = "; ".join(", ".join(alternatives) for alternatives in search["rounds"])
    labels = {row.variant.name: row.label_of_all for row in rows}
    found, takers = [], dict[str, list[str]]()
    for row in rows:
        if row.variant.options_of is not None:
            takers.setdefault(row.variant.options_of, []).append(row.label_of_all)
        elif changes := chosen.get(row.variant.name):
            found.append(f"{row.label_of_all} {', '.join(changes)}")
    taken = [f"what was chosen for {labels[source]}: {', '.join(names)}" for source, names in takers.items()]
    length = "" if search["steps"] is None else f" after {search['steps']:,} steps"
    baseline = labels[search["baseline"]]
    return (
        f"Chosen for each variant by itself, by its held-out loss{length} with seed {search['seed']}, which is left "
        f"out here, one option after the other ({tried}); all but {baseline} begin with the better of none and what "
        f"was chosen for {baseline}. Chosen: {'; '.join(found) or 'nothing'}; the others stay as they are."
        + (f" Without a search of their own take {'; '.join(taken)}." if taken else "")
    )


def _balance_and_memory(rows: Sequence[VariantSummary]) -> str:
    balance = "Balance: E·Σ f·P in the last quarter of training, 1 is even" if any(row.balance for row in rows) else ""
    memory = "Memory: the most that the training process used" if any(row.memory for row in rows) else ""
    return ". ".join(filter(None, [balance, memory])) + "." * bool(balance or memory)


def _control(rows: Sequence[VariantSummary]) -> str:
    controlled = [(abs(row.off_target), row) for row in rows if row.variant.controlled and row.off_target is not None]
    if not controlled:
        return ""
    furthest, row = max(controlled, key=lambda each: each[0])
    which = row.label_of_all + " is the furthest" * (len(controlled) > 1)
    return (
        f"Controlled routers are within {100 * furthest:.2g} % of their target in the mean over the last quarter of "
        f"training, with every seed ({which})."
    )


def _drift(rows: Sequence[VariantSummary]) -> str:
    free = [
        row for row in rows if not row.variant.controlled and row.off_target is not None and abs(row.off_target) > 0.01
    ]
    drifts = ", ".join(f"{row.label_of_all} {signed(100 * (row.off_target or 0.0), 0)} %" for row in free)
    return f"Not at their target there, as nothing controls them; with the furthest seed: {drifts}." if drifts else ""


def _flops(results: StudyResults, rows: Sequence[VariantSummary]) -> str:
    note = f"FLOPs of a forward pass per {results.unit}; a multiply-add counts 2"
    if all(row.active is None for row in rows):
        return note + "."
    measured = "They follow the experts that held-out tokens really used, the mean over MoE layers"
    return (
        f"{note}. {measured}. Active: mean experts per token; in training over the last quarter, ± over its steps too."
    )


def _time(results: StudyResults, rows: Sequence[VariantSummary]) -> str:
    compared = {row.variant.baseline for row in rows}
    baselines = [(row.variant.seconds_per_step, row) for row in rows if row.variant.name in compared]
    times = ", ".join(f"{_seconds(time)} of {row.label_of_all}" for time, row in baselines if time is not None)
    if results.timing is None or not times:
        return ""
    made = results.timing["made"]
    return f"Time per step relative to the baseline's: 1× is {times}, with nothing beside it on {_machine(made)}."


def _made(rows: Sequence[VariantSummary]) -> list[str]:
    """The machine and the versions that scored each run, and as a rule trained it, each once."""
    made = [run.made for row in rows for run in row.runs]
    return [
        f"{what} {_shares([show(each) for each in made])}."
        for what, show in {"Scored on": _machine, "Scored with": _versions}.items()
        if made
    ]


def _shares(found: Sequence[str]) -> str:
    counts = Counter(found)
    if len(counts) == 1:
        return found[0]
    return "**not all alike**: " + "; ".join(f"{several(count, 'run')} with {what}" for what, count in counts.items())


def _machine(made: Mapping[str, Any]) -> str:
    machine = made["machine"]
    used = [several(machine["cores"], "core"), several(made["threads"], "thread"), made["precision"]]
    return ", ".join(filter(None, [machine["gpu"], machine["cpu"], *used]))


def _versions(made: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in made["versions"].items())


def several(count: int, name: str) -> str:
    """So many of what a noun names."""
    return f"{count} {name}{'s' * (count != 1)}"


def _seconds(seconds: float) -> str:
    return f"{rounded(1000 * seconds, 0)} ms" if seconds < 1 else f"{seconds:.3g} s"


def _plain(value: object) -> str:
    if value is None:
        return "all"
    return f"{value:g}" if isinstance(value, float) else str(value)


def signed(number: float, decimals: int) -> str:
    """With a sign, unless it is rounded to 0."""
    text = f"{number:+.{decimals}f}".replace("-", "−")
    return text if text.strip("+−0.") else text[1:]


# ----------------------------------------------------------------------------------------------------------------- CSV

FACTS = ("name", "label", "objective", "baseline", "router", "controlled", "experts", "target")
SIZES = ("parameters", "active_parameters", "seconds_per_step")
SPREADS = ("loss", "metric", "active", "training", "flops", "balance", "memory")


def to_csv(results: StudyResults) -> str:
    """All numbers over seeds, unrounded, one line per variant; a cell is empty where a number is not known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    titles = {"metric": (results.metric or {}).get("name", "metric"), "training": "training_active"}
    spreads = [f"{titles.get(name, name)}{end}" for name in SPREADS for end in ("", "_std")]
    paired = ("difference", "difference_low", "difference_high", "difference_pairs")
    writer.writerow([*FACTS, "seeds", *spreads, *paired, *SIZES, "relative_time"])
    for row in summaries(results):
        known = [(each.mean, each.std) if each else (None, None) for each in (getattr(row, name) for name in SPREADS)]
        difference = row.difference
        pair = (difference.mean, difference.low, difference.high, difference.n) if difference else (None,) * 4
        facts, sizes = ([getattr(row.variant, name) for name in names] for names in (FACTS, SIZES))
        seeds = " ".join(map(str, row.seeds))
        writer.writerow([*facts, seeds, *(number for each in known for number in each), *pair, *sizes, row.slowdown])
    return text.getvalue()
