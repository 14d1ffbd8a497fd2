"""The page of the report: whole, safe, and telling what the statistics hold. The figures are tested by themselves."""

import base64
import re
from dataclasses import dataclass, replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dit_moe.analysis import page
from dit_moe.analysis.drawing import ReportFigure
from dit_moe.analysis.page import PAGE, figures_of, write_page
from dit_moe.analysis.statistics import Passage, RoutingStats, Target
from tests.analysis import synthetic

VOID = {"meta", "img", "source", "br"}
EVIL = "<script>alert('x')</script> & \"more\""


class Reader(HTMLParser):
    """Collects elements and text, and insists that every element is closed where it should be."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@dataclass
class Blank:
    """Stands in for a drawn figure."""

    name: str
    dark: bool

    def get_size_inches(self) -> tuple[float, float]:
        return 4.8, 3.2


def blank_figures(stats: RoutingStats) -> list[ReportFigure]:
    return [replace(figure, draw=partial(Blank, figure.name)) for figure in figures_of(stats)]


def written(stats: RoutingStats, folder: Path) -> tuple[Path, Reader]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "figures_of", blank_figures)
        patch.setattr(page, "png_of", lambda blank: f"{blank.name} {blank.dark}".encode())
        write_page(stats, folder)
    path = folder / PAGE
    return path, Reader(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def of_images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reader]:
    stats = synthetic.images()
    facts = {**stats.facts, "note": EVIL, EVIL: 1}
    return written(replace(stats, facts=facts), tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def of_text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reader]:
    return written(synthetic.text(), tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("report", ["of_images", "of_text"])
def test_the_page_asks_for_nothing_outside_itself(report: str, request: pytest.FixtureRequest):
    path, reader = request.getfixturevalue(report)
    for _, attributes in reader.elements:
        for name in ("src", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
    source = re.sub(r"data:image/png;base64,[^\"]*", "", path.read_text(encoding="utf-8"))
    assert not re.search(r"https?:|url\(|@import|<script", source)


def test_every_figure_is_a_file_and_in_the_page_light_and_dark_with_its_caption(of_images: tuple[Path, Reader]):
    path, reader = of_images
    figures = figures_of(synthetic.images())
    assert {file.stem for file in path.parent.glob("*.png")} == {figure.name for figure in figures}
    lights = [base64.b64decode(image["src"].split(",")[1]) for image in reader.all("img")]
    darks = [base64.b64decode(source["srcset"].split(",")[1]) for source in reader.all("source")]
    assert lights == [(path.parent / f"{figure.name}.png").read_bytes() for figure in figures]
    assert len(darks) == len(lights) and not set(darks) & set(lights)
    assert all(source["media"] == "(prefers-color-scheme: dark)" for source in reader.all("source"))
    for figure, image in zip(figures, reader.all("img"), strict=True):
        assert figure.caption in reader.text and figure.title in reader.text
        assert image["alt"] == figure.alt and (image["width"], image["height"]) == ("480", "320")


@pytest.mark.parametrize("report", ["of_images", "of_text"])
def test_the_contents_lead_to_every_section(report: str, request: pytest.FixtureRequest):
    _, reader = request.getfixturevalue(report)
    links = [link["href"].removeprefix("#") for link in reader.all("a")]
    assert links == [head["id"] for head in reader.all("h2")] and len(set(links)) == len(links)


def test_the_numbers_are_there_as_tables_but_for_large_ones_and_facts_as_text_whatever_they_hold(
    of_images: tuple[Path, Reader], tmp_path: Path
):
    stats, text = synthetic.images(), of_images[1].text
    assert text.count(EVIL) == 2 and not of_images[1].all("script")
    assert stats.active_LT is not None
    for value in [*stats.active_LT.ravel(), *stats.active_L, *stats.active_std_L]:
        assert f"{value:.2f}" in text
    many = replace(synthetic.bare(stats), class_names_C=[str(i) for i in range(1000)])
    many = replace(many, active_LC=np.tile(stats.active_L[:, None], (1, 1000)))
    assert len(written(many, tmp_path)[1].all("td")) < 100


def test_the_passage_holds_every_token_in_order_and_more_experts_have_a_stronger_shade_of_the_legend(
    of_text: tuple[Path, Reader],
):
    passage, (path, _) = synthetic.text().passage, of_text
    assert passage is not None
    first = path.read_text(encoding="utf-8").split("<div class=passage>")[1].split("</div>")[0]
    assert Reader(first).text == "".join(passage.tokens_W).replace("\n", "↵\n")
    shades = {attributes["class"] for tag, attributes in Reader(first).elements if tag == "span"}
    legend = path.read_text(encoding="utf-8").split("<ul class=legend>")[1].split("</ul>")[0]
    assert shades == {attributes["class"] for tag, attributes in Reader(legend).elements if tag == "span"}
    seen = sorted((float(number), int(shade)) for shade, number in re.findall(r'class=v(\d) title="([\d.]+) ', first))
    by_number = [shade for _, shade in seen]
    assert by_number == sorted(by_number) and by_number[0] == 1 and by_number[-1] == 5


def test_letters_that_cannot_be_written_are_named_in_the_passage(tmp_path: Path):
    passage = Passage(tokens_W=["\x00", "\ud800", "ok"], active_LW=np.array([[1.0, 2.0, 1.0]]))
    stats = replace(synthetic.bare(synthetic.text(layers=1)), passage=passage)
    _, reader = written(stats, tmp_path)
    assert "<U+0000>" in reader.text and "<U+D800>" in reader.text


def test_without_the_optional_parts_there_is_still_a_report(tmp_path: Path):
    stats = synthetic.bare(synthetic.images())
    _, reader = written(stats, tmp_path)
    assert [head["id"] for head in reader.all("h2")] == ["layers", "positions", "experts", "facts"]
    same = replace(stats, active_L=np.full(4, 2.0), active_std_L=np.zeros(4))
    _, reader = written(same, tmp_path)
    assert "Every token uses exactly 2 of 8 experts in every layer" in reader.text
    assert [head["id"] for head in reader.all("h2")] == ["experts", "facts"]


@pytest.mark.parametrize("kind, split", [("images", "heldout"), ("text", "train (nothing was held out)")])
def test_the_split_is_named(tmp_path: Path, kind: str, split: str):
    stats = getattr(synthetic, kind)()
    _, reader = written(replace(stats, facts=stats.facts | {"split": split}), tmp_path)
    assert f"split {split}" in reader.text and "held-out text" not in reader.text
    assert (f"The beginning of a document (split {split})" in reader.text) == (kind == "text")


def test_what_is_peculiar_to_the_routers_is_said(tmp_path: Path):
    _, reader = written(replace(synthetic.images(), remark="Expert 7 rests."), tmp_path)
    assert "Expert 7 rests." in reader.text


def test_classes_of_too_few_images_are_left_out_and_a_number_that_nothing_holds_is_called_nominal(tmp_path: Path):
    stats = replace(synthetic.images(), images_C=np.full(10, 1), target=Target(2.0, held=False))
    _, reader = written(stats, tmp_path)
    assert "Classes are left out: with 1 images a class" in reader.text and "bits on class" not in reader.text
    assert "classes" not in [head["id"] for head in reader.all("h2")]
    assert "(nominal 2)" in reader.text and "Nothing holds the routers to a number" in reader.text
