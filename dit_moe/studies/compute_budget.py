"""What `dit-moe dial` does: measure runs at several compute budgets, and keep every point that was ever measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dit_moe.config import ConfigError
from dit_moe.distributed import join_processes, locked
from dit_moe.files import require_own, write_atomically
from dit_moe.plotting import save_figure
from dit_moe.studies.compute_budget_figure import draw_compute_budget, to_markdown
from dit_moe.studies.compute_budget_runs import ImageOptions, ImageRunAtBudgets, RunAtBudgets, TextRunAtBudgets
from dit_moe.tasks import task_of

FORMAT = 1
ENTRY = ("measure", "identity", "points")
Entry = dict[str, Any]  # of dial.json: a measure of a run, by one set of settings


def measure_compute_budgets(
    folders: Sequence[Path],
    changes: Sequence[str],
    targets: list[float] | None,
    options: ImageOptions,
    out: Path | None,
) -> str:
    """Measure what is missing and write dial.json, dial.md and dial.png; returns the table.

    Args:
        changes: key=value, to the section `sample`, and of language models to `eval`, too.
        targets: mean active experts; None: the default ones of each run.
        out: where results go; None: dial in the first run folder.

    ValueError for bad input, before anything is measured.
    """
    if join_processes().num_processes > 1:
        raise ValueError("dit-moe dial works in one process; start it without a launcher")
    if not folders:
        raise ValueError("there is no RUN to measure; name one")
    for change in changes:
        name = change.partition("=")[0].removeprefix("sample.")
        if name in ("target", "p", "vary"):
            raise ConfigError(name, " is what the command itself changes; name the values with --targets")
    of_text = [task_of(folder).kind == "text" for folder in folders]
    if (given := list(options.given())) and all(of_text):
        raise ValueError(f"--{given[0]} is for models of images, and these are language models; leave it out")
    runs = [
        TextRunAtBudgets(folder, changes, targets) if text else _image_run(folder, changes, targets, options)
        for folder, text in zip(folders, of_text, strict=True)
    ]
    out = out or folders[0] / "dial"
    require_own(out, ("dial.md", "dial.png"), (out / "dial.json").is_file())  # which `_read` looks into
    with locked(out):
        kept = _read(out / "dial.json")
        shown = [_measured(run, kept, out) for run in runs]
        table = to_markdown(shown)
        write_atomically(out / "dial.md", table)
        save_figure(draw_compute_budget(shown), out / "dial.png")
    return table


def _image_run(
    folder: Path, changes: Sequence[str], targets: list[float] | None, options: ImageOptions
) -> ImageRunAtBudgets:
    run = ImageRunAtBudgets(folder, changes, targets, options)
    if run.split != "heldout":
        Console(stderr=True).print(f"{run.name}: the loss is of the images in {run.split}", style="yellow")
    return run


def _read(path: Path) -> list[Entry]:
    """The entries that an earlier call wrote. ValueError if they cannot be read."""
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text())
        if found["format"] == FORMAT:
            return [{**entry, **{name: entry[name] for name in ENTRY}} for entry in found["runs"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged; move it away, or name another folder with --out") from None
    raise ValueError(f"{path} is of another version, with format {found['format']}; name another folder with --out")


def _measured(run: RunAtBudgets, kept: list[Entry], out: Path) -> Entry:
    """What is drawn of a run. Points that are missing are measured, added to `kept` and written as they come."""
    entries = {measure: _entry(run, measure, kept) for measure in run.identities}

    def point(target: float | None) -> dict[str, Any]:
        missing = [name for name, entry in entries.items() if _find(entry, target) is None]
        if missing:
            what = "as trained" if target is None else f"{target:g} experts a token"
            Console(stderr=True).print(f"{run.name}: {what}")
            for name, measured in run.measure(target, missing).items():
                entries[name]["points"].append(measured)
            found = json.dumps({"format": FORMAT, "runs": kept}, indent=1, allow_nan=False)
            write_atomically(out / "dial.json", found + "\n")
        return {"target": target, "measures": {name: _find(entry, target) for name, entry in entries.items()}}

    first = point(None)
    active = first["measures"][next(iter(entries))]["active"]
    points = [first, *(point(target) for target in run.targets(active)[1:])]
    return {
        "name": run.name,
        "router": next(iter(entries.values()))["router"],
        "points": points,
    }


def _entry(run: RunAtBudgets, measure: str, kept: list[Entry]) -> Entry:
    """The one among `kept` whose numbers the run would give; or a new one, which is added."""
    made = run.entry(measure)
    for entry in kept:
        if entry["measure"] == measure and entry["identity"] == made["identity"]:
            return entry
    kept.append({**made, "points": []})
    return kept[-1]


def _find(entry: Entry, target: float | None) -> dict[str, Any] | None:
    return next((point for point in entry["points"] if point["target"] == target), None)
