"""Files that the commands wrote and read again: forged, cut, swapped."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random

import yaml

from dit_moe.json_files import write_sealed
from tests.bad_inputs.kinds import Case, Place, kind
from tests.bad_inputs.values import nested, spoil, spoil_bytes

READ_BY: dict[str, list[list[str]]] = {  # a file of ours: commands that read it, where a copy of its folder is called X
    "run/checkpoints/step_00000004/state.json": [
        ["sample", "X"],
        ["train", "digits.yaml", "--run", "X", "train.steps=6"],
    ],
    "run/checkpoints/step_00000004/config.yaml": [["sample", "X"], ["dial", "X"], ["eval", "X", "count=4"]],
    "run/config.yaml": [["train", "digits.yaml", "--run", "X", "train.steps=6"], ["sample", "X"], ["routing", "X"]],
    "run/log.jsonl": [["train", "digits.yaml", "--run", "X", "train.steps=6"], ["routing", "X"]],
    "lm/checkpoints/step_00000006/state.json": [["sample", "X"], ["perplexity", "X"], ["export", "X", "out"]],
    "lm/checkpoints/step_00000006/config.yaml": [["sample", "X"], ["perplexity", "X"]],
    "latents/manifest.json": [
        ["train", "latent.yaml", "data.path=X", "--run", "r"],
        ["encode", "latent.yaml", "data.path=X"],
    ],
    "latents/encoding.json": [["encode", "latent.yaml", "data.path=X"]],
    "latents/shards/00000.json": [["encode", "latent.yaml", "data.path=X", "--verify"]],
    "tokens/train/manifest.json": [["train", "lm.yaml", "data.path=X/train", "--run", "r"]],
    "features/samples_0/features.json": [["eval", "X/samples_0", "digits", "--metrics", "fd"]],
    "samples/png/labels.json": [["eval", "X/png", "digits", "--metrics", "class_accuracy"]],
    "samples/sample.json": [["eval", "X/images.npz", "digits", "--metrics", "fd"], ["sample", "RUN", "--out", "X"]],
    "metrics.json": [["table", "X"]],
    "autoencoder/config.json": [["encode", "latent.yaml", "first_stage.model=X", "data.path=new"]],
    "tokenizer/tokenizer.json": [["tokenize", "lm.yaml", "tokenize.tokenizer={name: X}", "data.path=new"]],
    "tokenizer/tokenizer_config.json": [["tokenize", "lm.yaml", "tokenize.tokenizer={name: X}", "data.path=new"]],
}


def _reader(place: Place, name: str) -> tuple[Path, list[str]]:
    """A copy of a good file, with all that is around it, and a command that reads it."""
    words = place.random.choice(READ_BY[name])
    top = Path(name).parts[0]
    copied = place.copy(top, "X" if "/" in name else "X.json")
    file = copied / Path(*Path(name).parts[1:]) if "/" in name else copied
    for config in ("digits.yaml", "lm.yaml", "latent.yaml"):
        if config in words:
            place.copy(config)
    named = {"X": copied.name, "RUN": str(place.good / "run")}
    words = [named.get(word, word).replace("name: X", f"name: {copied}") for word in words]
    return file, words


@kind
def forged(place: Place) -> Case:
    """A file that we wrote, with an absurd entry, and sealed again if it was."""
    name = place.random.choice(list(READ_BY))
    path, words = _reader(place, name)
    if name.endswith(".jsonl"):
        lines = path.read_text().splitlines()
        number = place.random.randrange(len(lines))
        entry, what = spoil(json.loads(lines[number]), place.random)
        lines[number] = json.dumps(entry)
        path.write_text("\n".join(lines) + "\n")
    elif name.endswith(".yaml"):
        first, _, rest = path.read_text().partition("\n")
        tree, what = spoil(yaml.safe_load(rest if first.startswith("#") else first + "\n" + rest), place.random)
        path.write_text((first + "\n" if first.startswith("#") else "") + yaml.safe_dump(tree, allow_unicode=True))
    else:
        body = json.loads(path.read_text())
        sealed = isinstance(body, dict) and body.pop("sha256", None) is not None
        tree, what = spoil(body, place.random)
        if sealed:
            write_sealed(path, tree)
        else:
            path.write_text(json.dumps(tree))
    return Case(f"{name}: {what}", words)


@kind
def no_json(place: Place) -> Case:
    """A file that we wrote, which is no JSON any more, or too much of it."""
    name = place.random.choice([name for name in READ_BY if name.endswith(".json")])
    path, words = _reader(place, name)
    data = path.read_bytes()
    what, made = place.pick(
        ("nested", nested(100_000).encode()),
        ("nested objects", nested(100_000, '{"a":', "}").replace(":}", ":1}", 1).encode()),
        ("a list", b"[]"),
        ("null", b"null"),
        ("a word", b'"banana"'),
        ("a number of 100 000 digits", b'{"format": ' + b"1" * 100_000 + b"}"),
        ("UTF-16", data.decode().encode("utf-16")),
        ("two objects", data + data),
        ("cut", data[: len(data) // 2]),
        ("NaN", b"NaN"),
        spoil_bytes(data, place.random)[::-1],
    )
    path.write_bytes(made)
    return Case(f"{name}: {what}", words)


@kind
def damaged(place: Place) -> Case:
    """A file of numbers that we wrote, cut, emptied, swapped or overwritten."""
    name, words = place.pick(
        ("run/checkpoints/step_00000004/ema.safetensors", ["sample", "X"]),
        (
            "run/checkpoints/step_00000004/optimizer.safetensors",
            ["train", "digits.yaml", "--run", "X", "train.steps=6"],
        ),
        ("lm/checkpoints/step_00000006/ema.safetensors", ["perplexity", "X"]),
        ("latents/shards/00001.safetensors", ["train", "latent.yaml", "data.path=X", "--run", "r"]),
        ("features/samples_0/00000.safetensors", ["eval", "X/samples_0", "digits", "--metrics", "fd"]),
        ("samples/images.npz", ["eval", "X/images.npz", "digits", "--metrics", "fd"]),
        (
            "autoencoder/diffusion_pytorch_model.safetensors",
            ["encode", "latent.yaml", "first_stage.model=X", "data.path=n"],
        ),
    )
    copied = place.copy(Path(name).parts[0], "X")
    for config in ("digits.yaml", "latent.yaml"):
        if config in words:
            place.copy(config)
    path = copied / Path(*Path(name).parts[1:])
    if place.random.random() < 0.3:
        what, data = safetensors_file(place.random)
    else:
        data, what = spoil_bytes(path.read_bytes(), place.random)
    path.write_bytes(data)
    return Case(f"{name}: {what}", words)


def safetensors_file(random: Random) -> tuple[str, bytes]:
    """A file of tensors whose header lies."""
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    what, header = random.choice(
        (
            ("no tensors", {}),
            ("another tensor", {"banana": entry}),
            ("10^13 elements", {"features": entry | {"shape": [10**13], "data_offsets": [0, 4 * 10**13]}}),
            ("a negative shape", {"features": entry | {"shape": [-2, -2]}}),
            ("an unknown dtype", {"features": entry | {"dtype": "X9"}}),
            ("overlapping offsets", {"features": entry, "labels": entry}),
            ("a list", [1, 2]),
        )
    )
    text = json.dumps(header).encode()
    length = random.choice((len(text), len(text), 10**13, 2**63))
    return f"safetensors with {what}, header of {length}", struct.pack("<Q", length) + text + bytes(16)
