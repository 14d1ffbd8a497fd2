"""The report of a network's routing: pictures as files, and one HTML page that holds all of them."""

# L layers, T noise levels, C classes, W tokens

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dit_moe.analysis.choose import specialisation
from dit_moe.analysis.gallery import figures_of, fixed_number
from dit_moe.analysis.page import folded, page, section, table
from dit_moe.analysis.picture import Picture, images_a_class
from dit_moe.analysis.stats import CLASS_IMAGES, Passage, RoutingStats
from dit_moe.files import write_atomically
from dit_moe.plotting import png_of
from dit_moe.rounding import rounded

REPORT = "report.html"
SMALL_TABLE = 600  # numbers
SHADES = 5  # of a passage's tokens
PASSAGE_LAYERS = 12  # shown one by one
BITS = ("bits", "of these")  # how the names of columns begin that hold bits, which are few


def write_report(stats: RoutingStats, folder: Path) -> list[str]:
    """Write `report.html` and the pictures as PNGs, for light paper, into the folder; returns the names of these.

    The page asks for nothing outside itself and follows the reader's choice of light or dark.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sections: dict[str, str] = {}
    pictures = []
    for picture in figures_of(stats):
        light, size = _rendered(picture, dark=False)
        dark, _ = _rendered(picture, dark=True)
        pictures.append(f"{picture.name}.png")
        write_atomically(folder / pictures[-1], light)
        sections[picture.section] = sections.get(picture.section, "") + _figure(picture, light, dark, size)
    for name, body in _told(stats).items():
        sections[name] = sections.get(name, "") + body
    write_atomically(folder / REPORT, report_html(stats, sections).encode("utf-8", "replace"))
    return pictures


def report_html(stats: RoutingStats, sections: Mapping[str, str]) -> str:
    """The page: what is found at a glance, the sections given, and the facts."""
    name = str(stats.facts.get("run", "a network"))
    split = f"<br>{escape(_split(stats))}" if "split" in stats.facts else ""
    title = f"<h1>Where the experts go</h1><p class='soft path'>{escape(name)}{split}</p>"
    header = title + _tiles(stats) + _notes(stats)
    facts = "".join(
        f"<tr><th scope=row>{escape(str(key))}</th><td>{escape(_plain(value))}</td></tr>\n"
        for key, value in stats.facts.items()
    )
    known = f"<div class=wide><table class=facts><tbody>{facts}</tbody></table></div>"
    main = "".join(section(title, body) for title, body in sections.items()) + section("Facts", known)
    return page(f"Routing of {name}", header, [*sections, "Facts"], main)


def _split(stats: RoutingStats) -> str:
    return f"split {stats.facts['split']}"


def _rendered(picture: Picture, *, dark: bool) -> tuple[bytes, tuple[int, int]]:
    figure = picture.draw(dark)
    width, height = figure.get_size_inches()
    return png_of(figure), (round(100 * width), round(100 * height))


def _figure(picture: Picture, light: bytes, dark: bytes, size: tuple[int, int]) -> str:
    return (
        f"<h3>{escape(picture.title)}</h3>\n<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark)}">'
        f'<img src="{_data_uri(light)}" alt="{escape(picture.alt)}" width={size[0]} height={size[1]}></picture>\n'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>\n"
    )


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _plain(value: Any) -> str:
    """A fact as people write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f") if abs(value) >= 10_000 else str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------------ at a glance


def _tiles(stats: RoutingStats) -> str:
    effective_L = stats.experts**stats.balance_L
    low, high = int(stats.active_L.argmin()), int(stats.active_L.argmax())
    tiles = [(f"{stats.active:.2f}", f"active experts per token ({stats.target})")]
    if fixed_number(stats) is None:
        tiles.append(
            (
                f"{stats.active_L[low]:.2f}–{stats.active_L[high]:.2f}",
                f"from the thriftiest layer ({stats.layers_L[low]}) to the most expensive ({stats.layers_L[high]})",
            )
        )
    if stats.active_LT is not None and stats.times_T is not None and fixed_number(stats) is None:
        mean_T = stats.active_LT.mean(0)[np.argsort(-stats.times_T)]
        tiles.append((f"{mean_T[0]:.2f} → {mean_T[-1]:.2f}", "from noise to data, mean of the layers"))
    tiles.append((f"{effective_L.mean():.1f} of {stats.experts}", "experts effectively in use, mean of the layers"))
    return (
        "<dl class=tiles>" + "".join(f"<div><dt>{escape(t)}</dt><dd>{escape(v)}</dd></div>" for v, t in tiles) + "</dl>"
    )


def _notes(stats: RoutingStats) -> str:
    notes = []
    if (number := fixed_number(stats)) is not None:
        notes.append(
            f"Every token uses exactly {number:g} of {stats.experts} experts in every layer, so there are no pictures "
            "of how many; those of which ones follow."
        )
    elif not stats.target.held:
        notes.append(
            f"Nothing holds the routers to a number of experts here: {stats.target} is what the experts' width is made "
            "for."
        )
    if stats.images_C is not None and len(stats.images_C) > 1 and not stats.tells_classes:
        notes.append(
            f"Classes are left out: with {images_a_class(stats.images_C)}, differences between them are mostly those "
            f"of single images. From a mean of {CLASS_IMAGES} on they are drawn; --images takes more."
        )
    return "".join(f"<p>{escape(note)}</p>" for note in notes)


# ------------------------------------------------------------------------------------------------ tables and passages


def _told(stats: RoutingStats) -> dict[str, str]:
    """What sections have besides pictures."""
    told = {}
    if fixed_number(stats) is None:
        told["Layers"] = _layers_table(stats)
        if stats.active_LT is not None and stats.times_T is not None and stats.active_LT.size <= SMALL_TABLE:
            heads = ["layer", *(f"t = {time:.2f}" for time in stats.times_T)]
            told["Noise levels"] = _numbers("Active experts as a table", heads, stats, stats.active_LT)
        if stats.tells_classes and stats.active_LC is not None and stats.active_LC.size <= SMALL_TABLE:
            told["Classes"] = _by_kind("class", stats.class_names_C, stats.active_LC, stats)
        if stats.tokens is not None and stats.tokens.active_LV.size <= SMALL_TABLE:
            names = [
                f"{token} ({_plain(int(count))}×)"
                for token, count in zip(stats.tokens.tokens_V, stats.tokens.count_V, strict=True)
            ]
            told["Tokens"] = _by_kind("token", names, stats.tokens.active_LV, stats)
        if stats.passage is not None:
            source = f"The beginning of a document ({_split(stats)})" if "split" in stats.facts else "A passage"
            told["A passage"] = _passage(stats.passage, stats.layers_L, source)
    else:
        told["Experts"] = _layers_table(stats)
    return told


def _layers_table(stats: RoutingStats) -> str:
    columns = {
        "active": stats.active_L,
        "± over tokens": stats.active_std_L,
        "effective experts": stats.experts**stats.balance_L,
        "busiest, × even": stats.load_LE.max(1) * stats.experts,
        "idlest, × even": stats.load_LE.min(1) * stats.experts,
    }
    if stats.load_LTE is not None:
        columns["bits on noise level"] = specialisation(stats.load_LTE)
    if stats.tells_classes and stats.load_LCE is not None:
        columns["bits on class"] = specialisation(stats.load_LCE)
    if stats.tells_classes and stats.shuffled_LCE is not None:
        columns["of these by chance"] = specialisation(stats.shuffled_LCE)
    if stats.tokens is not None and stats.tokens.load_LVE is not None:
        columns["bits on token"] = specialisation(stats.tokens.load_LVE)
    return _numbers("The layers as a table", ["layer", *columns], stats, np.stack([*columns.values()], axis=1))


def _numbers(summary: str, heads: list[str], stats: RoutingStats, values_LX: np.ndarray) -> str:
    rows = [
        [str(layer), *(_number(value, head) for value, head in zip(values_X, heads[1:], strict=True))]
        for layer, values_X in zip(stats.layers_L, values_LX, strict=True)
    ]
    return folded(summary, table(heads, rows))


def _number(value: float, head: str) -> str:
    return rounded(value, 3 if head.startswith(BITS) else 2)


def _by_kind(kind: str, names: list[str], active_LK: np.ndarray, stats: RoutingStats) -> str:
    rows = [
        [name, f"{active_L.mean():.2f}", *(f"{value:.2f}" for value in active_L)]
        for name, active_L in zip(names, active_LK.T, strict=True)
    ]
    heads = [kind, "mean", *(f"layer {layer}" for layer in stats.layers_L)]
    return folded("Active experts as a table", table(heads, rows))


def _passage(passage: Passage, layers: list[int], source: str) -> str:
    """The text with every token shaded and underlined by its active experts: the mean of the layers, then each."""
    mean_W = passage.active_LW.mean(0)
    low, high = int(mean_W.argmin()), int(mean_W.argmax())
    told = (
        f"<p>{escape(source)}. The stronger a token's colour and the thicker its line, the more experts it "
        f"takes, as a mean of the layers: from {mean_W[low]:.2f} (<q>{escape(_visible(passage.tokens_W[low]))}</q>) to "
        f"{mean_W[high]:.2f} (<q>{escape(_visible(passage.tokens_W[high]))}</q>).</p>"
    )
    body = told + _shaded(passage.tokens_W, mean_W)
    for index, layer in list(enumerate(layers))[:PASSAGE_LAYERS]:
        body += folded(f"Layer {layer} alone", _shaded(passage.tokens_W, passage.active_LW[index]))
    return body


def _shaded(tokens: list[str], active_W: np.ndarray) -> str:
    """Tokens in equal steps of active experts, with a legend of the steps."""
    edges = np.linspace(active_W.min(), active_W.max(), SHADES + 1)
    shade_W = np.clip(np.searchsorted(edges[1:-1], active_W, side="left") + 1, 1, SHADES)
    words = "".join(
        f'<span class=v{shade} title="{active:.2f} experts">{escape(_visible(token))}</span>'
        for token, active, shade in zip(tokens, active_W, shade_W, strict=True)
    )
    names = "".join(
        f"<li><span class=v{shade}>&nbsp;{edges[shade - 1]:.2f} – {edges[shade]:.2f}&nbsp;</span></li>"
        for shade in range(1, SHADES + 1)
        if bool((shade_W == shade).any())
    )
    return f"<ul class=legend><li>active experts:</li>{names}</ul><div class=passage>{words}</div>"


def _visible(token: str) -> str:
    """Line breaks are seen and still break lines; letters that cannot be printed are named."""
    token = token.replace("\r", "")
    shown = "".join(c if c.isprintable() or c in "\n\t" else f"<U+{ord(c):04X}>" for c in token)
    return shown.replace("\n", "↵\n")
