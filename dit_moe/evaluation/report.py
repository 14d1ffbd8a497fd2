"""What a report of an evaluation holds, as metrics.json (`Report.to_json`, `Report.from_json`) and on stderr.

The floor of a distance is that of held-out images to the reference, for as many held-out images as generated ones:
distances shrink as images are added, so numbers at different N say nothing about each other.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rich.table import Table

from dit_moe.config import Tree, build, convert, section
from dit_moe.evaluation.comparability import UNKNOWN, Reason
from dit_moe.formatting import PlainConsole
from dit_moe.json_files import Count, NonNegative


@dataclass(frozen=True, kw_only=True)
class Distance:
    """A Fréchet distance; None where a number cannot be known."""

    generated: NonNegative | None  # mean over sampling seeds
    generated_std: NonNegative | None = None  # over them
    floor: NonNegative | None = None  # of held-out images
    floor_estimate: NonNegative | None = None  # by formula, for independent draws; sets of equal mix come out lower
    ratio: NonNegative | None = None  # of generated to floor
    noise: NonNegative | None = None  # of the noise that sampling starts from, decoded: the far end
    reconstruction: NonNegative | None = None  # of held-out images that an autoencoder has encoded and decoded
    reconstruction_ratio: NonNegative | None = None  # of that to floor
    n: Count | None = None  # images on the left side of each distance
    n_reference: Count | None = None
    seeds: Count | None = None


@dataclass(frozen=True, kw_only=True)
class Value:
    """Any other number of a metric: the mean over sampling seeds, and beside it those of real images."""

    mean: float | None
    std: float | None = None  # over sampling seeds
    heldout: float | None = None
    reconstruction: float | None = None


Number = Distance | Value | float | None  # the last two of a spread within a set
VALUE_ENDINGS = {"mean": "", "std": "_std", "heldout": "_heldout", "reconstruction": "_reconstruction"}  # of its keys
OF_SOME_RUNS = ("reconstruction", "reconstruction_ratio", "noise")  # of latents; in a feature space of their own


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a report came about; None where it does not say."""

    samples: Sequence[Tree] = ()  # one set for each sampling seed
    reference: Tree = field(default_factory=dict)
    heldout: Tree | None = None
    reconstruction: Tree | None = None
    extractor: Tree = field(default_factory=dict)
    n_gen: Count | None = None
    n_ref_images: Count | None = None
    n_ref_statistics: Count | None = None
    metrics: Tree = field(default_factory=dict)  # settings by name
    better: Mapping[str, str | None] = field(default_factory=dict)  # by the number's key: "lower", "higher"
    versions: Mapping[str, str] = field(default_factory=dict)
    identical: Sequence[str] = ()  # images that are in the reference, or equal to each other
    asked: Tree = field(default_factory=dict)  # recipe, sampling and read: what the command was asked for
    reasons: Sequence[Reason] = ()  # why published numbers may not stand beside this report

    @property
    def comparable(self) -> bool:
        """Whether published numbers may stand beside this report."""
        return not self.reasons

    def to_json(self) -> Tree:
        found = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        asked, reasons = found.pop("asked"), found.pop("reasons")
        because = {"not_comparable_because": [each.text for each in reasons]}
        return {**found, **asked, "comparable_to_published": not reasons, **because}

    @classmethod
    def from_json(cls, tree: Tree) -> Provenance:
        """Older results say less, an extractor by its name alone, and not always whether they are comparable."""
        known = {each.name for each in dataclasses.fields(cls)} - {"asked", "reasons"}
        found = {name: value for name, value in tree.items() if name in known and value is not None}
        if isinstance(found.get("extractor"), str):
            found["extractor"] = {"name": found["extractor"]}
        samples = convert(list[Tree | str], found.get("samples", []), "provenance.samples")
        found["samples"] = [each if isinstance(each, dict) else {"name": each} for each in samples]
        because = convert(list[str] | None, tree.get("not_comparable_because"), "provenance.not_comparable_because")
        reasons = [Reason.read(each) for each in because or []]
        if not reasons and tree.get("comparable_to_published") is not True:
            reasons = [UNKNOWN]
        asked: Tree = {name: tree[name] for name in ("recipe", "sampling", "read") if name in tree}
        with section("provenance"):
            return replace(build(cls, found), asked=asked, reasons=reasons)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The numbers of an evaluation by their keys in metrics.json, where they come from, and what to know about them.

    A key is ``fd_<extractor>`` and the like; with the verified Inception ``fd_…`` is ``fid``, ``sfd_…`` is ``sfid``,
    and the others stand without the extractor's name. A spread within a set, such as KID's over its subsets, is one
    number.
    """

    numbers: Mapping[str, Number]
    provenance: Provenance
    warnings: Sequence[str] = ()
    more: Tree = field(default_factory=dict)  # what others have added to the file: the run's experts and training time

    @property
    def distances(self) -> dict[str, Distance]:
        return {key: each for key, each in self.numbers.items() if isinstance(each, Distance)}

    def to_json(self) -> Tree:
        """What metrics.json holds."""
        facts = {"provenance": self.provenance.to_json(), "warnings": list(self.warnings)}
        return {**_tree_of(self.numbers), **facts, **self.more}

    @classmethod
    def from_json(cls, tree: Tree) -> Report:
        """Read what `to_json` gave, of older versions too, whose distances and provenance say less."""
        rest = dict(tree)
        provenance, warnings = Provenance.from_json(rest.pop("provenance")), rest.pop("warnings", [])
        known = {each.name for each in dataclasses.fields(Distance)}
        numbers: dict[str, Number] = {}
        for key, value in tree.items():
            if isinstance(value, dict) and "generated" in value:
                numbers[key] = build(Distance, {k: each for k, each in rest.pop(key).items() if k in known}, key)
            elif f"{key}_heldout" in rest:
                parts = {name: rest.pop(key + ending, None) for name, ending in VALUE_ENDINGS.items()}
                numbers[key] = build(Value, parts, key)
            elif key in rest and is_spread(key, provenance.extractor.get("name")):
                numbers[key] = convert(float | None, rest.pop(key), key)
        return cls(numbers=numbers, provenance=provenance, warnings=warnings, more=rest)

    def __str__(self) -> str:
        """The table that the command prints."""
        text = io.StringIO()
        print_report(self, PlainConsole(file=text, width=WIDTH))
        return text.getvalue()

    def flat(self) -> dict[str, float]:
        """The numbers that are known by dotted names: "fid.ratio", "precision_heldout"."""
        return flat_numbers(self.numbers)


def is_spread(key: str, extractor: str | None) -> bool:
    """Whether a number is a spread within a set, over its splits or subsets, by its key in a report."""
    return key.removesuffix(f"_{extractor}").endswith("_std")


def _tree_of(numbers: Mapping[str, Number]) -> Tree:
    tree: Tree = {}
    for key, number in numbers.items():
        if isinstance(number, Value):
            parts = _without_absent(dataclasses.asdict(number))
            tree |= {key + VALUE_ENDINGS[name]: each for name, each in parts.items()}
        else:
            tree[key] = _without_absent(dataclasses.asdict(number)) if isinstance(number, Distance) else number
    return tree


def _without_absent(parts: Tree) -> Tree:
    """Without the parts that only some runs can have, where they are not known."""
    return {name: each for name, each in parts.items() if each is not None or name not in OF_SOME_RUNS}


def flat_numbers(numbers: Mapping[str, Number]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in _tree_of(numbers).items():
        parts = {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
        flat |= {name: part for name, part in parts.items() if part is not None}
    return flat


# --------------------------------------------------------------------------------------------------- printed on stderr

COLUMNS = {
    "generated": "generated",
    "generated_std": "±",
    "floor": "held-out",
    "ratio": "ratio",
    "noise": "noise",
    "floor_estimate": "expected",
}
RECONSTRUCTED = "  reconstructed"  # held-out images, encoded and decoded
ARROWS = {"lower": " ↓", "higher": " ↑"}
SHOWN = 2  # reasons
ENOUGH = 2  # images a feature, from which on `floor_estimate` is less than a tenth off for independent draws
WIDTH = 100  # of a report as text, letters


def print_report(report: Report, console: PlainConsole | None = None) -> None:
    """Print a row for each number, the columns that any of them has, and what there is to know about them."""
    table = Table(pad_edge=False)  # every cell fits 80 columns
    rows = _report_rows(report)
    columns = [name for name in COLUMNS if any(row.get(name) is not None for _, row in rows)]
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(COLUMNS[name], justify="right")
    for label, row in rows:
        table.add_row(label, *(_in_9_characters(row.get(name)) for name in columns))
    console = console or PlainConsole(stderr=True)
    console.print(_title(report.provenance))  # not the table's own, which is broken to its width
    console.print(table)
    for line in footnotes(report):
        console.print(line)
    console.print(_comparability(report.provenance))
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow")


def footnotes(report: Report) -> list[str]:
    """How to read the table: what its columns are, and where the numbers stand."""
    space, lines = report.provenance.extractor["name"], list[str]()
    first = next((each for each in report.distances.values() if each.floor is not None), None)
    if first is not None:
        lines.append("held-out: real images that were not trained on; ratio: generated over held-out")
        ends = f"held-out {_in_9_characters(first.floor)} is as good as real images"
        far = f", noise {_in_9_characters(first.noise)} is nothing learned" if first.noise is not None else ""
        lines.append(ends + far)
    if any(each.floor_estimate is not None for each in report.distances.values()):
        lines.append(_expected(first is not None, report.provenance))
    if len(report.provenance.samples) > 1:
        lines.append("±: over the seeds of sampling, not of training")
    if any(key.startswith("nearest_") for key in report.numbers):
        lines.append("nearest_*: neither direction is better; far below held-out means copies")
    classes = report.provenance.extractor.get("classes")
    if isinstance(classes, int) and any(key in report.numbers for key in ("class_accuracy", f"class_accuracy_{space}")):
        lines.append(f"class_accuracy: chance {1 / classes:.3f}")
    return lines


def _expected(measured: bool, facts: Provenance) -> str:
    """What `floor_estimate` is, and when not to trust it."""
    about = "expected: held-out by a formula, for images drawn at random"
    counts, dim = [each for each in (facts.n_gen, facts.n_ref_statistics, facts.n_ref_images) if each], facts.extractor
    enough = ENOUGH * dim.get("dim", 0)
    few = f" (it reads low of fewer than {enough} images)" if counts and min(counts) < enough else ""
    return f"{about}{few}" + ("; where they differ, trust held-out" if measured else "")


def _title(facts: Provenance) -> str:
    """What was compared with what, with the counts that are known."""
    seeds, n = len(facts.samples), facts.n_gen
    images = "an unknown number of" if not n else f"{seeds} × {n}" if seeds > 1 else str(n)
    of, among = facts.n_ref_statistics, facts.n_ref_images
    counts = [f"statistics of {of}"] if of is not None and of != among else []
    counts += [f"{among} images"] if among else []
    known = f" ({', '.join(counts)})" if counts else ""
    return f"{images} images against {facts.reference['name']}{known}, features of {facts.extractor['name']}"


def _comparability(facts: Provenance) -> str:
    if facts.comparable:
        return "comparable to published numbers"
    reasons = [reason.text for reason in facts.reasons]
    more = [f"and {len(reasons) - SHOWN} more in provenance.not_comparable_because"] if len(reasons) > SHOWN else []
    return f"not comparable to published FIDs: {'; '.join([*reasons[:SHOWN], *more])}"


def _report_rows(report: Report) -> list[tuple[str, dict[str, float | None]]]:
    space, better = report.provenance.extractor["name"], report.provenance.better
    rows: list[tuple[str, dict[str, float | None]]] = []
    for key, number in report.numbers.items():
        label = key.removesuffix(f"_{space}") + ARROWS.get(better.get(key) or "", "")
        if isinstance(number, Distance):
            rows.append((label, dataclasses.asdict(number)))
            if number.reconstruction is not None:
                again = {"generated": number.reconstruction, "ratio": number.reconstruction_ratio}
                rows.append((RECONSTRUCTED, {"floor": number.floor, **again}))
        elif isinstance(number, Value):
            rows.append((label, {"generated": number.mean, "generated_std": number.std, "floor": number.heldout}))
    return rows


def _in_9_characters(value: float | None) -> str:
    if value is None:
        return ""
    size = abs(value)
    return f"{value:.0f}" if 1e4 <= size < 1e8 else f"{value:.4g}" if 1e-3 <= size < 1e4 or not size else f"{value:.2e}"
