"""Quality against compute of one checkpoint, whose tokens are made to use fewer or more experts than in training.

Routers with a threshold get one that is solved for each target, top-k routers another k; the run is measured as it was
trained, too. Of every point are measured the active experts, the FLOPs that they make, the held-out loss at fixed noise
and times, and the Fréchet distance of samples; of a language model, held-out bits per byte. Changes, key=value, are to
the section `sample`, and for language models to `eval`, too.

Writes dial.json, dial.md and dial.png. The same command goes on where it stopped, and measures anew what another
checkpoint, or other settings, would give. dial.json keeps all points that were ever measured, the others show those
that were asked for.

    dit-moe dial runs/digits
    dit-moe dial runs/digits runs/digits_topk --targets 1,2,3,4 --out dial sampler.steps=10
    dit-moe dial runs/imagenet256/DiT-B-2-8E2A --no-metric --images 2000 --draws 2
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dit_moe.config import ConfigError
from dit_moe.distributed import join_processes, locked
from dit_moe.files import require_own, write_atomically
from dit_moe.plotting import save_figure
from dit_moe.studies.compute_budget import HIGHEST, LOWEST, POINTS, ImageOptions, ImageSubject, Subject, TextSubject
from dit_moe.studies.compute_budget_figure import draw_dial, to_markdown
from dit_moe.tasks import task_of

FORMAT = 1
OF_IMAGES = ("seeds", "images", "draws")  # options
ENTRY = ("measure", "identity", "points")
Entry = dict[str, Any]  # of dial.json: a measure of a run, by one set of settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `run` reads."""
    parser.add_argument("words", nargs="+", metavar="RUN", help="run folders, or checkpoint folders; key=value")
    parser.add_argument(
        "--targets",
        metavar="A,B",
        help=f"mean active experts; default: {POINTS} from {LOWEST:g} to {HIGHEST:g} times that of training; of top-k, "
        "the whole numbers among them",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go; default: dial in the first RUN")
    parser.add_argument("--no-metric", action="store_true", help="sample no images: the held-out loss alone")
    parser.add_argument("--seeds", type=int, metavar="N", help="sampling seeds; default: the run's eval.seeds")
    parser.add_argument("--images", type=int, metavar="N", help="held-out images, evenly spaced; default: all")
    parser.add_argument("--draws", type=int, metavar="N", help="of noise and time for each held-out image; default: 8")


def run(args: argparse.Namespace) -> None:
    """Measure what is missing, write, and print the table. ValueError for bad input, before the work starts."""
    if join_processes().num_processes > 1:
        raise ValueError("dit-moe dial works in one process; start it without a launcher")
    words = [Path(word) for word in args.words if "=" not in word or Path(word).exists()]
    changes = [word for word in args.words if Path(word) not in words]
    folders = list({folder.resolve(): folder for folder in words}.values())
    _require_sense(args, folders, changes)
    targets = None if args.targets is None else _numbers(args.targets)
    subjects = [_subject(folder, changes, targets, args) for folder in folders]
    out = args.out or folders[0] / "dial"
    require_own(out, ("dial.md", "dial.png"), (out / "dial.json").is_file())  # which `_kept` looks into
    with locked(out):
        kept = _kept(out / "dial.json")
        shown = [_measured(subject, kept, out) for subject in subjects]
        table = to_markdown(shown)
        write_atomically(out / "dial.md", table)
        save_figure(draw_dial(shown), out / "dial.png")
    print(table, end="")


def _require_sense(args: argparse.Namespace, folders: Sequence[Path], changes: Sequence[str]) -> None:
    if not folders:
        raise ValueError("there is no RUN to measure; name one")
    for change in changes:
        name = change.partition("=")[0].removeprefix("sample.")
        if name in ("target", "p", "vary"):
            raise ConfigError(name, " is what the command itself changes; name the values with --targets")
    given = [option for option in OF_IMAGES if getattr(args, option) is not None]
    for option in given:
        if getattr(args, option) < 1:
            raise ValueError(f"--{option} {getattr(args, option)} must be at least 1")
    if args.no_metric and args.seeds is not None:
        raise ValueError("--seeds is for samples, which --no-metric leaves out; drop one")
    if given and all(task_of(folder).kind == "text" for folder in folders):
        raise ValueError(f"--{given[0]} is for models of images, and these are language models; leave it out")


def _numbers(text: str) -> list[float]:
    try:
        numbers = sorted({float(each) for each in text.split(",")})
    except ValueError:
        raise ValueError(f"--targets {text} must be numbers with commas between them: 1,1.5,2") from None
    return numbers


def _subject(folder: Path, changes: Sequence[str], targets: list[float] | None, args: argparse.Namespace) -> Subject:
    if task_of(folder).kind == "text":
        return TextSubject(folder, changes, targets)
    options = ImageOptions(metric=not args.no_metric, **{name: getattr(args, name) for name in OF_IMAGES})
    subject = ImageSubject(folder, changes, targets, options)
    if subject.split != "heldout":
        Console(stderr=True).print(f"{subject.name}: the loss is of the images in {subject.split}", style="yellow")
    return subject


# -------------------------------------------------------------------------------------------------------------- points


def _kept(path: Path) -> list[Entry]:
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


def _measured(subject: Subject, kept: list[Entry], out: Path) -> Entry:
    """What is drawn of a run. Points that are missing are measured, added to `kept` and written as they come."""
    entries = {measure: _entry(subject, measure, kept) for measure in subject.identities}

    def point(target: float | None) -> dict[str, Any]:
        missing = [name for name, entry in entries.items() if _find(entry, target) is None]
        if missing:
            what = "as trained" if target is None else f"{target:g} experts a token"
            Console(stderr=True).print(f"{subject.name}: {what}")
            for name, measured in subject.measure(target, missing).items():
                entries[name]["points"].append(measured)
            found = json.dumps({"format": FORMAT, "runs": kept}, indent=1, allow_nan=False)
            write_atomically(out / "dial.json", found + "\n")
        return {"target": target, "measures": {name: _find(entry, target) for name, entry in entries.items()}}

    first = point(None)
    active = first["measures"][next(iter(entries))]["active"]
    points = [first, *(point(target) for target in subject.targets(active)[1:])]
    return {
        "name": subject.name,
        "router": next(iter(entries.values()))["router"],
        "points": points,
    }


def _entry(subject: Subject, measure: str, kept: list[Entry]) -> Entry:
    """The one among `kept` whose numbers the subject would give; or a new one, which is added."""
    made = subject.entry(measure)
    for entry in kept:
        if entry["measure"] == measure and entry["identity"] == made["identity"]:
            return entry
    kept.append({**made, "points": []})
    return kept[-1]


def _find(entry: Entry, target: float | None) -> dict[str, Any] | None:
    return next((point for point in entry["points"] if point["target"] == target), None)
