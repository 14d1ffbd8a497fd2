"""Configs, changes to them and options that no command can follow."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from tests.bad_inputs.kinds import Case, Place, kind
from tests.bad_inputs.values import leaves, nested, other, spoil


def _use(place: Place, config: Path, name: str) -> list[str]:
    """A command that reads a config like the good one of that `name`."""
    others = {"digits.yaml": "quickstart", "lm.yaml": "tokenize", "latent.yaml": "encode"}
    command = place.pick("train", "train", others[name])
    return [command, str(config), *(["--run", "run"] if command in ("train", "quickstart") else [])]


@kind
def config_value(place: Place) -> Case:
    """A config file with an entry that is gone, unknown or absurd."""
    name = place.pick("digits.yaml", "digits.yaml", "lm.yaml", "latent.yaml")
    path = place.copy(name)
    tree, what = spoil(yaml.safe_load(path.read_text()), place.random)
    if tree.get("train") == {} or what == "train.steps gone":
        tree["train"] = {"steps": 2}  # the default is a training of weeks
    path.write_text(yaml.safe_dump(tree, allow_unicode=True))
    return Case(f"{name}: {what}", _use(place, path, name))


@kind
def config_text(place: Place) -> Case:
    """A config file that is no config file."""
    text = (place.good / "digits.yaml").read_text()
    aliases = "a: &a [x, x]\n" + "".join(
        f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
        for before, after in zip("abcdefgh", "bcdefghi", strict=True)
    )
    what, data = place.pick(
        ("nothing", b""),
        ("a list", b"- a\n- b\n"),
        ("a word", b"banana"),
        ("nested", b"model: " + nested(100_000).encode()),
        ("aliases", aliases.encode()),
        ("an alias of itself", b"model: &a [*a]\n"),
        ("tabs", text.replace("  ", "\t").encode()),
        ("two documents", (text + "---\n" + text).encode()),
        ("a key twice", (text + "\nmodel:\n  depth: 3\n").encode()),
        ("a tag", b"model: !!python/object/apply:os.system [echo]\n"),
        ("UTF-16", text.encode("utf-16")),
        ("Latin-1", text.encode() + "# é\nname: é\n".encode("latin-1")),
        ("bytes", place.random.randbytes(500)),
        ("NUL", text.encode() + b"\x00\n"),
        ("an unclosed string", text.encode() + b'name: "a\n'),
        ("a number of a million digits", b"train: {lr: " + b"1" * 1_000_000 + b"}\n"),
        ("a line of ten million letters", b"a" * 10_000_000),
    )
    path = place.folder / "config.yaml"
    path.write_bytes(data)
    return Case(f"a config file: {what}", [place.pick("train", "encode", "tokenize", "compare"), str(path)])


@kind
def config_path(place: Place) -> Case:
    """A config file that cannot be read as a file."""
    what = place.pick("missing", "folder", "fifo", "/dev/zero", "link to itself", "/dev/null", "a\nb")
    path = place.folder / "config.yaml"
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "link to itself":
        path.symlink_to(path)
    elif what != "missing":
        path = Path(what)
    return Case(f"a config file: {what}", [place.pick("train", "encode", "tokenize", "compare"), str(path)])


@kind
def override(place: Place) -> Case:
    """A change on the command line that is unknown or absurd."""
    name = place.pick("digits.yaml", "digits.yaml", "lm.yaml")
    tree = yaml.safe_load((place.good / name).read_text())
    path = place.random.choice(leaves(tree))
    value: Any = tree
    for key in path:
        value = value[key]
    key = ".".join(map(str, path))
    word = place.pick(
        f"{key}={json.dumps(other(value, place.random))[:20_000]}",
        f"{key}=1" + "0" * 400,
        f"{key}={{",
        f"{key}=[cat,dog",
        f"{key}x=1",
        f"{key}.a.b=1",
        f"{key}=${{banana}}",
        f"banana.{key}=1",
    )
    return Case(f"{name} {word[:60]}", ["train", str(place.copy(name)), word, "--run", "run"])


@kind
def option(place: Place) -> Case:
    """An option of a command that cannot be."""
    run, lm = (str(place.copy(name)) for name in ("run", "lm"))  # commands write into them
    npz = str(place.good / "samples/images.npz")
    number = place.pick("-1", "nan", "1e15", "banana", "", "1" + "0" * 30, "½", "0x10", "999999999999999")
    words = place.pick(
        ["eval", npz, "digits", "--metrics", place.pick("banana", "", "fd,,", "fd fd", "[fd]", "kid,banana")],
        ["eval", npz, "digits", "--kid-subset-size", number],
        [
            "eval",
            npz,
            "digits",
            "--extractor",
            place.pick("banana", "{", "os:system", "{name: dinov2, dim: x}", "a:b:c"),
        ],
        ["eval", npz, "digits", "--size", number],
        ["eval", npz, "digits", "--range", place.pick("1", "1,1", "a,b", "nan,1", "1,-1", "0,1,2")],
        ["eval", npz, "digits", "--weights", place.pick("missing.pt", "/dev/zero", ".", npz)],
        ["eval", npz, "digits", "--out", place.pick(".", "a/b/c.json", "x.txt", "/proc/x.json")],
        [
            "eval",
            npz,
            place.pick("banana", "digits/banana", "{name: banana}", "{", "", "/dev/zero", "/", "digits/train/x"),
        ],
        ["eval", run, f"count={number}"],
        ["eval", run, "digits", f"guidance.scale={place.pick('nan', 'inf', 'x', '[1]')}"],
        ["eval", run, "digits", "--seeds", number],
        ["eval", run, "digits", "--recipe", place.pick("adm-50k", "banana")],
        ["eval"],
        ["eval", npz, npz, npz, "--out", npz],
        ["sample", run, f"count={number}"],
        ["sample", run, f"batch_size={number}"],
        ["sample", run, f"seed={place.pick('x', '1.5', '-1', '1' + '0' * 40)}"],
        ["sample", run, f"labels={place.pick('[cat,dog]', 'banana', '[11]', '[-1]', '{a: 1}', '[0.5]', '[[1]]')}"],
        [
            "sample",
            run,
            f"sampler={place.pick('banana', '{name: heun, steps: 0}', '{}', '[heun]', '{name: heun, x: 1}')}",
        ],
        ["sample", run, f"sampler.steps={number}"],
        ["sample", run, f"target={place.pick('0', '-1', '99', 'nan', 'x')}"],
        ["sample", run, f"p={place.pick('0', '-1', '2', 'nan', 'x')}"],
        ["sample", run, "--save", place.pick("banana", "", "npz,,png", "[npz]")],
        ["sample", run, "--recipe", place.pick("banana", "dit", "[dit]")],
        ["sample", run, "--prompt", "hello"],
        ["sample", lm, place.pick("temperature=nan", "temperature=-1", "top_p=2", "max_new_tokens=-1", "prompts=[1]")],
        ["sample", place.pick("missing", ".", "/", "/dev/null", "a\nb", "[red]", "x" * 5000)],
        ["dial", run, "--targets", place.pick("banana", "0", "-1", "nan", "1,,2", "1e9")],
        ["dial", run, "--images", number],
        ["dial", run, "--draws", number],
        ["routing", run, "--times", number],
        ["routing", run, "--images", number],
        ["routing", run, "--split", "banana"],
        ["routing", lm, "--tokens", number],
        ["perplexity", lm, "--stride", number],
        ["perplexity", lm, place.pick("missing.txt", ".", "/dev/zero", npz)],
        ["perplexity", run],
        ["export", run, "out"],
        ["export", lm, place.pick("out", "/proc/x"), "--olmoe"],
        ["table", place.pick("missing", ".", npz, "/dev/zero", "[red]")],
        ["table", run, "--published", "banana"],
        ["compare", place.pick("banana", ".", "digits"), place.pick("seeds=[]", "seeds=x", "banana=1", "variants=[]")],
        ["compare", "digits", "--only", place.pick("banana", "topk/99", "topk/x", "/")],
        ["compare", "digits", "--list", place.pick("seeds=[-1]", "seeds=[0.5]", "train.steps=x", "timing_steps=nan")],
        ["train", "digits", "--run", place.pick("/proc/x", "/dev/null", "")],
        [place.pick("banana", "", "--banana", "trian")],
    )
    return Case("options", words)
