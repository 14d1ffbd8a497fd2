"""What a reader of a study's table must know of its numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dit_moe.rounding import rounded
from dit_moe.studies.statistics import Scores, scores


def notes(results: Mapping[str, Any], rows: Sequence[Scores]) -> list[str]:
    """A sentence or two each: what was run, on what, what the numbers are, and what is missing."""
    found = [_missing(results), _seeds(rows), _no_log(rows), _loss(results), _intervals(results, rows)]
    found += [_control(rows), _drift(rows), _flops(results, rows), _time(results, rows), *_made(rows)]
    return [note for note in found if note]


def _missing(results: Mapping[str, Any]) -> str:
    if results["finished"] and not results["missing"]:
        return ""
    labels = {row.variant["name"]: row.label_of_all for row in scores(results)}
    seeds: dict[str, list[str]] = {}
    for name, seed in results["missing"]:
        seeds.setdefault(name, []).append(str(seed))
    what = "; ".join(f"{labels.get(name, name)} with seed {', '.join(which)}" for name, which in seeds.items())
    return f"**Not finished.** Missing: {what or 'scores'}. Numbers are of the runs that are there."


def _seeds(rows: Sequence[Scores]) -> str:
    steps = sorted({run["step"] for row in rows for run in row.runs})
    if not steps:
        return "No run is there yet."
    seeds = sorted({seed for row in rows for seed in row.seeds})
    trained = f"{steps[0]:,} steps" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,} steps, **not all as long**"
    return f"Trained for {trained}, seeds {', '.join(map(str, seeds))}; ± is the standard deviation over seeds (n − 1)."


def _no_log(rows: Sequence[Scores]) -> str:
    folders = [run["folder"] for row in rows for run in row.runs if not run["curves"]["step"]]
    return f"**No log.jsonl**, and so nothing of the training, in {', '.join(folders)}." if folders else ""


def _loss(results: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{name} {_plain(value)}" for name, value in (results["settings"]["heldout"] or {}).items())
    label, given = results["loss"]["label"], f" ({settings})" * bool(settings)
    same = "held-out text" if results["unit"] == "token" else "held-out images, times and noise"
    return f"{label[:1].upper() + label[1:]}: the same {same} for all runs{given}."


def _intervals(results: Mapping[str, Any], rows: Sequence[Scores]) -> str:
    bounded = [row.difference for row in rows if row.difference is not None and row.difference.low is not None]
    if not any(row.difference for row in rows):
        return ""
    if not bounded:
        return "Differences are of runs with the same seed; one seed has no interval."
    clear = sum(each.excludes_zero for each in bounded)
    tested = "text" if results["unit"] == "token" else "images, times and noise"
    return (
        f"Differences are of runs with the same seed, which share initial weights, data and noise; below 0 is better. "
        f"Intervals are Student's, for one comparison each, and tell of other training seeds with these held-out "
        f"{tested}, not of others; {clear} of {len(bounded)} exclude 0 (bold)."
    )


def _control(rows: Sequence[Scores]) -> str:
    steered = [(abs(row.off_target), row) for row in rows if _is_steered(row) and row.off_target is not None]
    if not steered:
        return ""
    furthest, row = max(steered, key=lambda each: each[0])
    which = row.label_of_all + " is the furthest" * (len(steered) > 1)
    return (
        f"Steered routers are within {100 * furthest:.2g} % of their target in the mean over the last quarter of "
        f"training, with every seed ({which})."
    )


def _drift(rows: Sequence[Scores]) -> str:
    free = [row for row in rows if not _is_steered(row) and row.off_target is not None and abs(row.off_target) > 0.01]
    drifts = ", ".join(f"{row.label_of_all} {signed(100 * (row.off_target or 0.0), 0)} %" for row in free)
    return f"Not at their target there, as nothing steers them; with the furthest seed: {drifts}." if drifts else ""


def _is_steered(row: Scores) -> bool:
    return bool(row.variant["controlled"])


def _flops(results: Mapping[str, Any], rows: Sequence[Scores]) -> str:
    note = f"FLOPs of a forward pass per {results['unit']}; a multiply-add counts 2"
    if all(row.active is None for row in rows):
        return note + "."
    measured = "They follow the experts that held-out tokens really used, the mean over MoE layers"
    return (
        f"{note}. {measured}. Active: mean experts per token; in training over the last quarter, ± over its steps too."
    )


def _time(results: Mapping[str, Any], rows: Sequence[Scores]) -> str:
    compared = {row.variant["baseline"] for row in rows}
    timed = [row for row in rows if row.variant["seconds_per_step"] is not None]
    baselines = [row for row in timed if row.variant["name"] in compared]
    if results["timing"] is None or not baselines:
        return ""
    times = ", ".join(f"{_seconds(row.variant['seconds_per_step'])} of {row.label_of_all}" for row in baselines)
    made = results["timing"]["made"]
    return f"Time per step relative to the baseline's: 1× is {times}, with nothing beside it on {_machine(made)}."


def _made(rows: Sequence[Scores]) -> list[str]:
    """The machine and the versions that scored each run, and as a rule trained it, each once."""
    made = [run["made"] for row in rows for run in row.runs]
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
    """With a sign, which nothing has not."""
    text = f"{number:+.{decimals}f}".replace("-", "−")
    return text if text.strip("+−0.") else text[1:]
