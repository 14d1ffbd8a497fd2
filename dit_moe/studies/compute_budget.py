"""What `dit-moe dial` does: measure runs at several compute budgets, keep every point, and show them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from dit_moe.checkpoint import is_run
from dit_moe.config import ConfigError, Keys, Tree, Within
from dit_moe.distributed import join_processes, locked
from dit_moe.files import require_own, write_atomically
from dit_moe.formats import home_of
from dit_moe.formatting import markdown_table, tell
from dit_moe.json_files import NonNegative, checked, load, require_format
from dit_moe.plotting import INK, LINES, MARKERS, PAPER, canvas, labels_above, save_figure, styled
from dit_moe.studies.compute_budget_runs import ImageOptions, ImageRunAtBudgets, RunAtBudgets, TextRunAtBudgets
from dit_moe.studies.table import si_prefix
from dit_moe.tasks import task_of

FORMAT = 1
Entry = dict[str, Any]  # of dial.json: a measure of a run, by one set of settings


class _Point(TypedDict):
    """A measure at a target, or as trained; what is shown of it."""

    target: float | None
    value: float
    active: NonNegative
    flops: Annotated[float, Within(1, 1e30)]
    std: NotRequired[NonNegative | None]
    floor: NotRequired[float | None]


class _Entry(TypedDict):
    measure: str
    identity: Tree
    router: str
    points: list[Annotated[Tree, Keys(_Point)]]


class _Dial(TypedDict):
    """What dial.json holds."""

    runs: list[Annotated[Entry, Keys(_Entry)]]


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
        out: where results go; None: see `place_of`.

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
    given = [*options.given, *(["extractor"] if options.extractor is not None else [])]
    if given and all(of_text):
        raise ValueError(f"--{given[0]} is for models of images, and these are language models; leave it out")
    runs = [
        TextRunAtBudgets(folder, changes, targets) if text else ImageRunAtBudgets(folder, changes, targets, options)
        for folder, text in zip(folders, of_text, strict=True)
    ]
    for run in runs:
        if isinstance(run, ImageRunAtBudgets) and run.split != "heldout":
            tell(f"{run.name}: the loss is of the images in {run.split}")
    out = out or place_of(folders[0])
    require_own(out, ("dial.md", "dial.png"), (out / "dial.json").is_file())  # which `_read` looks into
    with locked(out):
        kept = _read(out / "dial.json")
        shown = [_measured(run, kept, out) for run in runs]
        table = to_markdown(shown)
        write_atomically(out / "dial.md", table)
        save_figure(draw_compute_budget(shown), out / "dial.png")
    return table


def place_of(run: Path) -> Path:
    """Where results go unless the user says otherwise: `dial` in the folder of the first run."""
    return (run if is_run(run) else home_of(run)) / "dial"


def _read(path: Path) -> list[Entry]:
    """The entries that an earlier call wrote. ValueError if they cannot be read."""
    if not path.is_file():
        return []
    remedy = "move it away, or name another folder with --out"
    found = load(path, remedy)
    require_format(found, FORMAT, path, remedy)
    return checked(found, _Dial, str(path), remedy)["runs"]


def _measured(run: RunAtBudgets, kept: list[Entry], out: Path) -> Entry:
    """What is drawn of a run. Points that are missing are measured, added to `kept` and written as they come."""
    entries = {measure: _entry(run, measure, kept) for measure in run.identities}

    def point(target: float | None) -> dict[str, Any]:
        missing = [name for name, entry in entries.items() if _find(entry, target) is None]
        if missing:
            what = "as trained" if target is None else f"{target:g} experts a token"
            tell(f"{run.name}: {what}")
            for name, measured in run.measure(target, missing).items():
                entries[name]["points"].append(measured)
            found = json.dumps({"format": FORMAT, "runs": kept}, indent=1, allow_nan=False)
            write_atomically(out / "dial.json", found + "\n")
        return {"target": target, "measures": {name: _find(entry, target) for name, entry in entries.items()}}

    first = point(None)
    active = first["measures"][next(iter(entries))]["active"]
    points = [first, *map(point, run.targets(active))]
    return {"name": run.name, "router": next(iter(entries.values()))["router"], "points": points}


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


# ------------------------------------------------------------------------------------------- the figure and the table

MEASURES = {  # name: what it is called, what its FLOPs are of; all are the better the lower
    "loss": ("held-out loss", "FLOPs per image and network evaluation"),
    "distance": ("Fréchet distance", "FLOPs per image sampled"),
    "bits": ("held-out bits per byte", "FLOPs per token"),
}
ROUTERS = {"dtopp": "DTop-p", "topp": "top-p", "topk": "top-k"}

MeasuredRun = Mapping[
    str, Any
]  # name, router and points of a run; a point has a target, None as trained, and its measures


def _measures(runs: Sequence[MeasuredRun]) -> list[str]:
    return [name for name in MEASURES if any(name in point["measures"] for run in runs for point in run["points"])]


def _labels(runs: Sequence[MeasuredRun]) -> list[str]:
    """What tells the runs apart: the router if that does, or the name."""
    routers = [run["router"] for run in runs]
    names = [run["name"] for run in runs]
    if len(set(routers)) == len(runs) > 1:
        return [ROUTERS.get(router, router) for router in routers]
    return names if len(set(names)) == len(runs) else [f"{name} ({i})" for i, name in enumerate(names, start=1)]


@styled
def draw_compute_budget(runs: Sequence[MeasuredRun], *, dark: bool = False) -> Any:
    """A panel for each quality, a line for each run, the point as trained ringed; beside points, active experts."""
    from matplotlib.lines import Line2D

    names = _measures(runs)
    figure, axes = canvas(len(names), height=0.35 + 2.75 * len(names))
    for name, axis in zip(names, axes[:, 0], strict=True):
        label, of = MEASURES[name]
        largest = max(measure["flops"] for run in runs for _, measure in _points(run, name))
        prefix, scale = si_prefix(largest)
        floors = set()
        for number, run in enumerate(runs):
            points = list(_points(run, name))
            colour, x = LINES[number % len(LINES)], [measure["flops"] / scale for _, measure in points]
            y = [measure["value"] for _, measure in points]
            error = [measure.get("std") or 0 for _, measure in points]
            how = {"color": colour, "marker": MARKERS[number % len(MARKERS)], "label": _labels(runs)[number]}
            axis.errorbar(x, y, yerr=error if any(error) else None, capsize=2, **how)
            for (target, measure), at_x, at_y in zip(points, x, y, strict=True):
                if target is None:
                    axis.plot(at_x, at_y, "o", ms=11, mfc="none", mec=INK[dark], mew=1.2, zorder=5)
                crowded = target is None and any(
                    abs(at_x - other) < 0.05 * (max(x) - min(x)) for other in x if other != at_x
                )
                if len(runs) <= 2 and not crowded:
                    _annotate(axis, f"{measure['active']:.2f}", at_x, at_y, above=number == 0, dark=dark)
            floors |= {measure.get("floor") for _, measure in points} - {None}
        for floor in floors:
            axis.axhline(floor, color=INK[dark], lw=1, ls=":", zorder=1)
            axis.annotate(
                "real images", (0.99, floor), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
            )
        axis.set_xlabel(f"{prefix}{of}" if prefix else of)
        axis.set_ylabel(f"{label} (lower is better)" if len(label) < 18 else label)
        axis.margins(x=0.08, y=0.18)
    ring = Line2D([], [], ls="", marker="o", ms=9, mfc="none", mec=INK[dark], mew=1.2, label="as trained")
    labels_above(axes[0, 0], columns=3, handles=[*axes[0, 0].get_legend_handles_labels()[0], ring])
    return figure


def _annotate(axis: Any, text: str, x: float, y: float, *, above: bool, dark: bool) -> None:
    how: dict[str, Any] = {"fontsize": 7.5, "color": INK[dark], "ha": "center", "textcoords": "offset points"}
    box = {"facecolor": PAPER[dark], "edgecolor": "none", "pad": 0.6, "alpha": 0.75}
    axis.annotate(text, (x, y), xytext=(0, 9 if above else -9), va="bottom" if above else "top", bbox=box, **how)


def _points(run: MeasuredRun, name: str) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """In the order of their FLOPs."""
    found = [(point["target"], point["measures"][name]) for point in run["points"] if name in point["measures"]]
    yield from sorted(found, key=lambda each: each[1]["flops"])


def to_markdown(runs: Sequence[MeasuredRun]) -> str:
    """The points of all runs as a table, in the order of their FLOPs; as trained in bold."""
    names, labels = _measures(runs), _labels(runs)
    titles = ["run", "target"]
    for name in names:
        label, of = MEASURES[name]
        titles += [label, "active experts", of]
    rows: list[list[str]] = []
    for run, label in zip(runs, labels, strict=True):
        for point in sorted(run["points"], key=lambda point: next(iter(point["measures"].values()))["flops"]):
            row = [label, "**as trained**" if point["target"] is None else f"{point['target']:.4g}"]
            for name in names:
                row += _cells(point["measures"].get(name))
            rows.append(row)
    return markdown_table(zip(titles, zip(*rows, strict=True), strict=True))


def _cells(measure: Mapping[str, Any] | None) -> list[str]:
    if measure is None:
        return ["", "", ""]
    value = f"{measure['value']:.4g}"
    if measure.get("std") is not None:
        value += f" ± {measure['std']:.2g}"
    prefix, scale = si_prefix(measure["flops"])
    return [value, f"{measure['active']:.3f}", f"{measure['flops'] / scale:.4g} {prefix}".strip()]
