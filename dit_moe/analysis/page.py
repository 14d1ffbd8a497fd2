"""The page of the report: figures as files, and one HTML file that holds all of them."""

# L layers, T noise levels, K classes or tokens, W tokens of a passage

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader

from dit_moe.analysis.active_experts import (
    class_and_token_figures,
    layer_figures,
    noise_level_figures,
    position_figures,
    training_figures,
)
from dit_moe.analysis.drawing import ReportFigure, images_per_class
from dit_moe.analysis.expert_use import expert_use_figures
from dit_moe.analysis.image_examples import image_example_figures
from dit_moe.analysis.statistics import CLASS_IMAGES, SAME, RoutingStats, specialisation
from dit_moe.files import write_atomically
from dit_moe.formatting import rounded
from dit_moe.plotting import png_of

PAGE, TEMPLATE = "report.html", "page.html.jinja"
SMALL_TABLE = 600  # numbers
SHADES = 5  # of a passage's tokens
PASSAGE_LAYERS = 12  # shown one by one
FEW_BITS = ("bits", "of these")  # how the names of columns begin that hold small numbers, of bits


def figures_of(stats: RoutingStats) -> list[ReportFigure]:
    """All figures that these statistics allow.

    Where every token uses the same number of experts, as with top-k, those of that number are left out.
    """
    groups: list[Callable[[RoutingStats], Iterator[ReportFigure]]] = [expert_use_figures, training_figures]
    if stats.fixed_number is None:
        by_number = [layer_figures, noise_level_figures, image_example_figures, position_figures]
        groups = [*by_number, class_and_token_figures, *groups]
    return [figure for group in groups for figure in group(stats)]


def write_page(stats: RoutingStats, folder: Path) -> list[str]:
    """Write `report.html` and the figures as PNGs, for light paper, into the folder; returns the names of these.

    The page asks for nothing outside itself and follows the reader's choice of light or dark.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sections: dict[str, _Section] = {}
    names = []
    for figure in figures_of(stats):
        light = figure.draw(dark=False)
        png = png_of(light)
        names.append(f"{figure.name}.png")
        write_atomically(folder / names[-1], png)
        width, height = (round(100 * inches) for inches in light.get_size_inches())
        dark = _data_uri(png_of(figure.draw(dark=True)))
        section = sections.setdefault(figure.section, _Section(figure.section))
        section.figures.append(_ShownFigure(figure, _data_uri(png), dark, width, height))
    for title, table in _tables(stats):
        sections.setdefault(title, _Section(title)).tables.append(table)
    if stats.passage is not None and stats.fixed_number is None:
        sections["A passage"] = _Section("A passage", passages=list(_passages(stats)))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template(TEMPLATE).render(
        name=str(stats.facts.get("run", "a network")),
        split=_split(stats),
        tiles=list(_tiles(stats)),
        notes=list(_notes(stats)),
        sections=list(sections.values()),
        facts=[(str(name), _readable(value)) for name, value in stats.facts.items()],
    )
    write_atomically(folder / PAGE, page.encode("utf-8", "replace"))
    return names


@dataclass(frozen=True)
class _ShownFigure:
    figure: ReportFigure
    light: str  # data URIs
    dark: str
    width: int  # CSS pixels
    height: int


@dataclass(frozen=True)
class _Table:
    """Texts; the first of each row is its name."""

    summary: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class _Token:
    text: str
    active: str
    shade: int


@dataclass(frozen=True)
class _ShadedPassage:
    """A passage with every token shaded and underlined by its active experts."""

    title: str
    source: str
    tokens: Sequence[_Token]
    lowest: _Token
    highest: _Token
    legend: Sequence[tuple[int, str, str]]  # a shade, from and to how many experts


@dataclass(frozen=True)
class _Section:
    title: str
    figures: list[_ShownFigure] = field(default_factory=list)
    tables: list[_Table] = field(default_factory=list)
    passages: list[_ShadedPassage] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _split(stats: RoutingStats) -> str | None:
    return f"split {stats.facts['split']}" if "split" in stats.facts else None


def _readable(value: Any) -> str:
    """A fact as people write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_readable(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_readable, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f") if abs(value) >= 10_000 else str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --------------------------------------------------------------------------------------------------------- at a glance


def _tiles(stats: RoutingStats) -> Iterator[dict[str, str]]:
    yield {"value": f"{stats.active:.2f}", "label": f"active experts per token ({stats.target})"}
    if np.ptp(stats.active_L) >= SAME:
        low, high = int(stats.active_L.argmin()), int(stats.active_L.argmax())
        label = f"from the cheapest layer ({stats.layers_L[low]}) to the most expensive ({stats.layers_L[high]})"
        yield {"value": f"{stats.active_L[low]:.2f}–{stats.active_L[high]:.2f}", "label": label}
    if stats.active_LT is not None and stats.times_T is not None and np.ptp(stats.active_LT) >= SAME:
        mean_T = stats.active_LT.mean(0)[np.argsort(-stats.times_T)]
        label = "from noise to data, mean of the layers"
        yield {"value": f"{mean_T[0]:.2f} → {mean_T[-1]:.2f}", "label": label}
    effective = f"{stats.effective_L.mean():.1f} of {stats.experts}"
    yield {"value": effective, "label": "experts effectively in use, mean of the layers"}


def _notes(stats: RoutingStats) -> Iterator[str]:
    if stats.remark is not None:
        yield stats.remark
    if stats.fixed_number is not None:
        yield (
            f"Every token uses exactly {stats.fixed_number:g} of {stats.experts} experts in every layer, so there are "
            "no pictures of how many; those of which ones follow."
        )
    elif stats.active_LT is not None and np.ptp(stats.active_LT) < SAME:
        yield (
            f"Every layer uses {stats.active:.4g} experts a token in the mean of each image, whatever its noise level, "
            "so there are no pictures of how many by noise level."
        )
    elif not stats.target.held:
        yield (
            f"Nothing holds the routers to a number of experts here: {stats.target} is what the experts' width is made "
            "for."
        )
    if stats.even_load:
        yield f"Every expert gets the same share of the pairs, 1/{stats.experts}, so there is no picture of the load."
    if stats.images_C is not None and len(stats.images_C) > 1 and not stats.can_compare_classes:
        yield (
            f"Classes are left out: with {images_per_class(stats.images_C)}, differences between them are mostly those "
            f"of single images. From a mean of {CLASS_IMAGES} on they are drawn; --images takes more."
        )


# ------------------------------------------------------------------------------------------------- tables and passages


def _tables(stats: RoutingStats) -> Iterator[tuple[str, _Table]]:
    """With the titles of their sections."""
    if stats.fixed_number is not None:
        yield "Experts", _layers_table(stats)
        return
    yield "Layers", _layers_table(stats)
    if stats.active_LT is not None and stats.times_T is not None and stats.active_LT.size <= SMALL_TABLE:
        columns = {f"t = {time:.2f}": active_L for time, active_L in zip(stats.times_T, stats.active_LT.T, strict=True)}
        yield "Noise levels", _by_layer("Active experts as a table", columns, stats)
    if stats.can_compare_classes and stats.active_LC is not None and stats.active_LC.size <= SMALL_TABLE:
        yield "Classes", _by_kind("class", stats.class_names_C, stats.active_LC, stats)
    if stats.tokens is not None and stats.tokens.active_LV.size <= SMALL_TABLE:
        counted = zip(stats.tokens.tokens_V, stats.tokens.count_V, strict=True)
        names = [f"{token} ({_readable(int(count))}×)" for token, count in counted]
        yield "Tokens", _by_kind("token", names, stats.tokens.active_LV, stats)


def _layers_table(stats: RoutingStats) -> _Table:
    columns = {
        "active": stats.active_L,
        "± over tokens": stats.active_std_L,
        "effective experts": stats.effective_L,
        "busiest, × even": stats.load_LE.max(1) * stats.experts,
        "least used, × even": stats.load_LE.min(1) * stats.experts,
    }
    if stats.load_LTE is not None:
        columns["bits on noise level"] = specialisation(stats.load_LTE)
    if stats.can_compare_classes and stats.load_LCE is not None:
        columns["bits on class"] = specialisation(stats.load_LCE)
    if stats.can_compare_classes and stats.shuffled_LCE is not None:
        columns["of these by chance"] = specialisation(stats.shuffled_LCE)
    if stats.tokens is not None and stats.tokens.load_LVE is not None:
        columns["bits on token"] = specialisation(stats.tokens.load_LVE)
    return _by_layer("The layers as a table", columns, stats)


def _by_layer(summary: str, columns: Mapping[str, np.ndarray], stats: RoutingStats) -> _Table:
    texts = [
        ["–" if np.isnan(value) else rounded(value, 3 if head.startswith(FEW_BITS) else 2) for value in values_L]
        for head, values_L in columns.items()
    ]
    rows = [[str(layer), *row] for layer, *row in zip(stats.layers_L, *texts, strict=True)]
    return _Table(summary, ["layer", *columns], rows)


def _by_kind(kind: str, names: Sequence[str], active_LK: np.ndarray, stats: RoutingStats) -> _Table:
    rows = [
        [name, f"{active_L.mean():.2f}", *(f"{value:.2f}" for value in active_L)]
        for name, active_L in zip(names, active_LK.T, strict=True)
    ]
    return _Table("Active experts as a table", [kind, "mean", *(f"layer {layer}" for layer in stats.layers_L)], rows)


def _passages(stats: RoutingStats) -> Iterator[_ShadedPassage]:
    """The text shaded by the mean of the layers, then by each layer."""
    assert stats.passage is not None
    split, tokens_W = _split(stats), [_visible(token) for token in stats.passage.tokens_W]
    source = "A passage" if split is None else f"The beginning of a document ({split})"
    yield _shaded("Mean of the layers", source, tokens_W, stats.passage.active_LW.mean(0))
    for layer, active_W in list(zip(stats.layers_L, stats.passage.active_LW, strict=True))[:PASSAGE_LAYERS]:
        yield _shaded(f"Layer {layer} alone", source, tokens_W, active_W)


def _shaded(title: str, source: str, texts: Sequence[str], active_W: np.ndarray) -> _ShadedPassage:
    """Tokens in equal steps of active experts."""
    edges = np.linspace(active_W.min(), active_W.max(), SHADES + 1)
    shade_W = np.clip(np.searchsorted(edges[1:-1], active_W, side="left") + 1, 1, SHADES)
    tokens = [
        _Token(text, f"{active:.2f}", int(shade)) for text, active, shade in zip(texts, active_W, shade_W, strict=True)
    ]
    legend = [(shade, f"{edges[shade - 1]:.2f}", f"{edges[shade]:.2f}") for shade in np.unique(shade_W).tolist()]
    return _ShadedPassage(title, source, tokens, tokens[active_W.argmin()], tokens[active_W.argmax()], legend)


def _visible(token: str) -> str:
    """Line breaks are seen and still break lines; letters that cannot be printed are named."""
    token = token.replace("\r", "")
    shown = "".join(c if c.isprintable() or c in "\n\t" else f"<U+{ord(c):04X}>" for c in token)
    return shown.replace("\n", "↵\n")
