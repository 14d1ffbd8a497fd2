"""Config files, overrides and typed sections."""

import os
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_moe import yaml_text
from dit_moe.config import (
    ConfigError,
    Place,
    build,
    dump,
    load,
    located,
    merge,
    override,
    parse,
    require,
    section,
    to_yaml,
)
from dit_moe.registry import Registry

SHAPES = Registry("shape")


@dataclass(frozen=True, kw_only=True)
class CircleConfig:
    radius: float = 1.0

    def __post_init__(self):
        require(self.radius > 0, self, "radius", "must be above 0; use a positive number")


@dataclass(frozen=True, kw_only=True)
class SquareConfig:
    side: float = 2.0


@SHAPES.register("circle", CircleConfig)
def circle(config: CircleConfig) -> str:
    return f"circle {config.radius}"


@SHAPES.register("square", SquareConfig)
def square(config: SquareConfig) -> str:
    return f"square {config.side}"


@dataclass(frozen=True, kw_only=True)
class Inner:
    steps: int = 10
    rate: float = 0.1
    mode: Literal["a", "b"] = "a"
    betas: tuple[float, ...] = (0.9, 0.99)
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    shape: Annotated[Any, SHAPES]
    train: Inner = field(default_factory=Inner)
    other: Annotated[Any, SHAPES] | None = None
    amount: float | Literal["auto"] = "auto"
    names: Literal["all"] | tuple[int | str, ...] = "all"
    flag: bool = False
    filled: Annotated[Any, SHAPES] = field(default_factory=SquareConfig)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_later_bases_and_the_file_itself_win_key_by_key(tmp_path):
    write(tmp_path, "a.yaml", "train: {steps: 1, rate: 0.5}\nflag: true\n")
    write(tmp_path, "sub/b.yaml", "train: {steps: 2}\n")
    path = write(tmp_path, "c.yaml", "base: [a.yaml, sub/b.yaml]\ntrain: {mode: b}\nshape: circle\n")
    assert load(path) == {"train": {"steps": 2, "rate": 0.5, "mode": "b"}, "flag": True, "shape": "circle"}


def test_overrides_win_over_files_and_keep_their_yaml_types(tmp_path):
    path = write(tmp_path, "a.yaml", "train: {steps: 1}\nshape: circle\n")
    config = build(Outer, load(path, ["train.steps=7", "train.rate=1e-4", "shape.radius=3", "train.betas=[0.5,0.6]"]))
    assert (config.train.steps, config.train.rate, config.train.betas) == (7, 1e-4, (0.5, 0.6))
    assert config.shape == CircleConfig(radius=3.0)


def test_options_without_a_name_are_the_default_entry_s():
    assert build(Outer, {"shape": "circle", "filled": {"side": 3}}).filled == SquareConfig(side=3.0)
    assert build(Outer, {"shape": "circle", "filled": {"name": "circle"}}).filled == CircleConfig()


def test_naming_another_entry_drops_the_options_of_the_old_one():
    old = {"shape": {"name": "circle", "radius": 5}, "train": {"steps": 3}}
    for new in ("square", {"name": "square"}):
        assert build(Outer, merge(old, {"shape": new})).shape == SquareConfig()
    assert build(Outer, merge(old, {"shape": {"radius": 6}})).shape == CircleConfig(radius=6.0)
    assert build(Outer, merge(old, {"shape": "circle"})).shape == CircleConfig(radius=5.0)


def test_another_name_of_the_same_entry_keeps_the_other_options():
    old = {"model": {"name": "DiT-S/2", "qk_norm": True}}
    assert merge(old, {"model": {"name": "DiT-B/4"}})["model"] == {"name": "DiT-B/4", "qk_norm": True}
    assert merge(old, {"model": "LM-tiny"})["model"] == {"name": "LM-tiny"}


def test_a_config_survives_the_trip_through_yaml(tmp_path):
    config = Outer(shape=SquareConfig(side=4.0), train=Inner(limit=3), other=CircleConfig(), amount=2.0)
    assert build(Outer, load(write(tmp_path, "a.yaml", to_yaml(config)))) == config
    assert dump(config)["shape"] == {"name": "square", "side": 4.0}


@dataclass(frozen=True, kw_only=True)
class Values:
    text: str | None
    texts: tuple[str, ...]
    number: float
    whole: int
    flag: bool
    numbers: tuple[float, ...] = ()


AWKWARD = [
    *("1e-3", "1.e3", "yes", "y", "null", "~", "", "0x1F", "1_000", "12:30", "2001-01-01", "=", "<<", ".5", "-.inf"),
    *(
        "a #b",
        "a: b",
        "- a",
        "'",
        '"',
        "!a",
        "&a",
        "*a",
        "|",
        "%",
        "@",
        "`",
        "[",
        "{a}",
        "\n\n a\n",
        " a ",
        "\t",
        "???",
    ),
    *("\r\n", "\x00", "\x07", "\x7f", "\x85", "\u2028", "\ufeffa", "\ufffe", "日本語", "שלום", "😀", "\\", "base"),
    *("${", "${a}", "a${oc.env:HOME}", "\\${a}", "$", "{", "}"),
]
FINITE = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.lists(st.sampled_from(AWKWARD) | st.text(max_size=5), max_size=4).map("".join)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return tmp_path_factory.mktemp("configs") / "a.yaml"


@settings(max_examples=50)
@given(
    config=st.builds(
        Values,
        text=TEXTS | st.none(),
        texts=st.lists(TEXTS, max_size=3).map(tuple),
        number=FINITE,
        whole=st.integers(-(2**63), 2**63 - 1),
        flag=st.booleans(),
        numbers=st.lists(FINITE, max_size=3).map(tuple),
    )
)
def test_whatever_a_config_holds_is_read_as_it_was_written(config_file, config):
    text = to_yaml(config)
    config_file.write_text(text)
    for tree in (parse(text), load(config_file)):
        assert repr(build(Values, tree)) == repr(config)  # repr: -0.0 is no 0.0
    assert override({}, [f"text={yaml_text.write(config.text)}"]) == {"text": config.text}


def test_every_awkward_text_stands_for_itself_in_a_stored_config():
    for text in AWKWARD:
        config = Values(text=text, texts=(text, f"a{text}b"), number=0.0, whole=0, flag=False)
        assert build(Values, parse(to_yaml(config))) == config


def test_only_a_user_s_own_file_has_its_dollars_looked_up(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    text = "train: {steps: 3}\nsteps: ${train.steps}\na: ${oc.env:SECRET}\nb: \\${oc.env:SECRET}\n"
    own = write(tmp_path, "config.yaml", text)
    found = {"train": {"steps": 3}, "steps": 3, "a": "hunter2", "b": "${oc.env:SECRET}"}
    assert load(own) == load(write(tmp_path, "c.yaml", "base: config.yaml")) == found
    assert load(own, ["a=${oc.env:SECRET}"])["a"] == "${oc.env:SECRET}"
    literal = {"train": {"steps": 3}, "steps": "${train.steps}", "a": "${oc.env:SECRET}", "b": "\\${oc.env:SECRET}"}
    assert parse(text) == literal
    (tmp_path / "checkpoints" / "step_00000002").mkdir(parents=True)  # it is a run's then
    assert load(own) == literal


def test_configs_of_older_versions_are_read_to_the_same_values():
    """As OmegaConf wrote them."""
    text = (
        "lr: 1.0e-07\nbeta: 1e-3\nname: '1e-3'\nletter: 'y'\ndate: '2001-01-01'\nwhen: 2001-01-01\nnone: null\nl: []\n"
    )
    read = {"lr": 1e-7, "beta": 1e-3, "name": "1e-3", "letter": "y", "date": "2001-01-01", "when": "2001-01-01"}
    assert parse(text) == read | {"none": None, "l": []}


def test_half_a_character_is_refused_before_anything_is_written():
    with pytest.raises(ConfigError, match=r"^texts\[1\] holds 'a\\udcff', which is not Unicode; write it in UTF-8"):
        build(Values, {"texts": ["a", "a\udcff"], "text": None, "number": 1, "whole": 1, "flag": True})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"shape": "circle", "train": {"stpes": 1}}, r"train\.stpes is not a known key; did you mean 'steps'\?"),
        ({"shape": "circle", "train": {"steps": "many"}}, r"train\.steps=many must be a whole number, not a text"),
        ({"shape": "circle", "train": {"steps": 1.5}}, r"train\.steps=1\.5 must be a whole number"),
        ({"shape": "circle", "train": {"steps": True}}, r"train\.steps=True must be a whole number"),
        ({"shape": "circle", "train": {"mode": "c"}}, r"train\.mode=c is not one of a, b"),
        ({"shape": "circle", "train": {"betas": 0.9}}, r"train\.betas=0\.9 must be a list"),
        ({"shape": "circle", "train": {"betas": [0.9, "x"]}}, r"train\.betas\[1\]=x must be a number"),
        ({"shape": "circle", "train": 3}, r"train=3 must be a section"),
        ({"shape": "circle", "flag": 1}, r"flag=1 must be true or false"),
        ({"shape": "circle", "amount": "all"}, r"amount=all must be a number, or auto"),
        ({"shape": "circle", "amount": 10**400}, r"amount=.* must be a"),
        ({"shape": "circle", "train": {"rate": 10**400}}, r"train\.rate=inf must be a finite number"),
        ({"shape": "circle", "train": {"steps": 2**63}}, r"train\.steps=9223372036854775808 is out of range"),
        ({"shape": "circle", "train": {"steps": "x" * 10**6}}, r"^train\.steps=x{80}… \(1,000,000 characters\) must"),
        ({"shape": "circle", "train": {"limit": [1]}}, r"train\.limit=\[1\] must be a whole number, not a list"),
        ({"shape": "circle", "names": 5}, r"names=5 must be all, or a list, of which each is a whole number or a text"),
        ({"shape": "circle", "names": [1, 2.5]}, r"names\[1\]=2\.5 must be a whole number, or a text"),
        ({"shape": "hexagon"}, r"shape\.name=hexagon: unknown shape 'hexagon'; known: circle, square"),
        ({"shape": {"radius": 1}}, r"shape\.name is missing; name a shape: circle, square"),
        ({"shape": "circle", "steps": 1}, r"^steps is not a known key; did you mean train\.steps\?"),
        ({"shape": {"name": "circle", "side": 1}}, r"shape\.side is not a known key; known: radius"),
        ({"shape": {"name": "circle", "radius": -1}}, r"shape\.radius=-1\.0 must be above 0; use a positive number"),
        ({}, r"shape is missing; add it"),
    ],
)
def test_every_mistake_is_one_error_that_names_the_dotted_path(tree, message):
    with pytest.raises(ConfigError, match=message):
        build(Outer, tree)


def test_a_mistake_within_a_section_is_told_with_its_whole_path():
    with pytest.raises(ConfigError, match=r"^train\.optimizer\.lr=0 is too low") as caught, section("train.optimizer"):
        raise ConfigError("lr", "=0 is too low")
    assert caught.value.path == "train.optimizer.lr" and caught.value.__suppress_context__
    with pytest.raises(OSError, match="disk"), section("train"):
        raise OSError("disk")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not valid YAML"),
        ("- 1\n- 2\n", "must hold `key: value` lines"),
        ("base: a.yaml\n", "inherits from itself"),
        ("base: 5\n", "base=5 must be a file name or a list of them"),
        ("base: [a.yaml, 5]\n", r"must be a file name or a list of them"),
        ("base: missing.yaml\n", "missing.yaml does not exist"),
        ("a: 1\nb: 2\na: 3\n", r"is not valid YAML: found duplicate key a in line 3, column 1"),
        ("a: &a [*a]\n", "more than 100 levels in each other"),
        ("a: data/${USER_DIR}/x\n", r"has a \$\{…\} that cannot be resolved: .*write \\\$\{ where the text itself"),
    ],
)
def test_unreadable_files_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, "a.yaml", text))


LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in pairwise("abcdefgh")
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1".encode("utf-16"), r"is not UTF-8 \(byte 0 is 0xff\); save it in that encoding"),
        (b"a: caf\xe9", r"is not UTF-8 \(byte 6 is 0xe9\)"),
        (b"a: " + b"[" * 10**5 + b"]" * 10**5, "nesting depth|levels in each other"),
        (b"{a: " * 200 + b"1" + b"}" * 200, "more than 100 levels in each other"),
        (LAUGHS.encode(), "more than 1,000,000 values, aliases written out"),
        (b"a: 1\n---\nb: 2\n", "expected a single document"),
        (b"a:\n\t- 1\n", "cannot start any token"),
        (b"a: !!int x", "a value is not what its tag says"),
        (b"a: !!bool x", "a value is not what its tag says"),
        (b"a: \x1b[31m", "control characters are not allowed"),
        (b"#" * (2**20 + 1), "characters, and 1,048,576 are the most"),
        (None, "is no file of text"),  # a FIFO, which would be waited for
    ],
    ids=range(12),
)
def test_a_file_that_is_no_config_is_refused_at_once(tmp_path, content, message):
    path = tmp_path / "a.yaml"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert len(str(caught.value)) < 400


def test_a_huge_file_is_not_read_and_a_byte_order_mark_is_no_text(tmp_path):
    write(tmp_path, "a.yaml", "").open("r+b").truncate(3 * 10**9)
    with pytest.raises(ConfigError, match="has 3,000,000,000 bytes, too many for a config"):
        load(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\n")
    assert load(tmp_path / "b.yaml") == {"a": 1}


@pytest.mark.parametrize(
    "override", ["train.steps", "=3", "train.steps=[1", "a..b=1", "train.lr" + ".a" * 10**5 + "=1"]
)
def test_unreadable_overrides_are_named(tmp_path, override):
    path = write(tmp_path, "a.yaml", "shape: circle\n")
    with pytest.raises(ConfigError, match=r"write key=value|cannot be parsed"):
        load(path, [override])


def test_registry_refuses_a_name_or_a_config_class_twice():
    registry = Registry("thing")
    registry.register("one", CircleConfig)(circle)
    with pytest.raises(ValueError, match="has a hyphen"):
        registry.register("one-more", SquareConfig)(square)
    with pytest.raises(ValueError, match="registered twice"):
        registry.register("one", SquareConfig)(square)
    with pytest.raises(ValueError, match="configures two things"):
        registry.register("two", CircleConfig)(circle)
    assert registry.build(CircleConfig(radius=2.0)) == "circle 2.0"
    with pytest.raises(ValueError, match="configures no thing"):
        registry.build(SquareConfig())


@dataclass(frozen=True, kw_only=True)
class PlacesConfig:
    path: Annotated[str, Place(("digits",))] | float | None = None
    split: str = "there"
    below: Any = None


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("there", "{}/there"),
        ("there/*.tar", "{}/there/*.tar"),
        ("there/train-{000..146}.tar", "{}/there/train-{{000..146}}.tar"),
        ("gone", "gone"),
        ("gone/*.tar", "gone/*.tar"),
        ("digits", "digits"),  # a name, though there is such a folder
        ("/", "/"),
        (0.1, "0.1"),
        (None, "None"),
    ],
)
def test_a_path_of_a_config_leads_where_it_was_given_if_something_is_there(tmp_path, given, found):
    for name in ("there", "digits"):
        (tmp_path / name).mkdir()
    config = located(PlacesConfig(path=given, below=PlacesConfig(path=given)), tmp_path)
    assert str(config.path) == str(config.below.path) == found.format(tmp_path)
    assert config.split == "there"  # the name of a split, and not a path
