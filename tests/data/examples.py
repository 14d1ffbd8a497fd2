"""A small data set of every registered kind, made on the spot, and what it takes to make more."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from dit_moe.data import DATASETS
from tests.autoencoders.encoded import encode

CLASSES = ("ant", "bee")


def pixels(seed: int, height: int = 16, width: int = 16) -> np.ndarray:
    """A picture of noise, uint8 [H, W, 3]."""
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def encoded(picture: np.ndarray | Image.Image, form: str = "PNG", **options: object) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    image.save(file, form, **options)
    return file.getvalue()


def write_tree(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def class_files(each: int = 4, first: int = 0) -> dict[str, bytes]:
    """Some images of each class, in class folders; those from `first` on are others."""
    return {
        f"{name}/{i:03d}.png": encoded(pixels(100 * label + i))
        for label, name in enumerate(CLASSES)
        for i in range(first, first + each)
    }


def keyed_files(labels: list[int], first: int = 0) -> dict[str, bytes]:
    """Images beside their labels, as webdataset has them."""
    files: dict[str, bytes] = {}
    for i, label in enumerate(labels, first):
        files |= {f"{i:05d}.png": encoded(pixels(i)), f"{i:05d}.cls": b"%d" % label}
    return files


def save_huggingface(folder: Path, labels: list[int], instead: Mapping[int, bytes] = {}) -> Path:
    """A saved `datasets.DatasetDict` with the splits train and validation; `instead` of some images, other bytes."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})

    def rows(first: int) -> datasets.Dataset:
        content = [instead.get(i, encoded(pixels(first + i))) for i in range(len(labels))]
        images = [{"bytes": each, "path": f"{i}.png"} for i, each in enumerate(content)]
        return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)

    datasets.DatasetDict({"train": rows(0), "validation": rows(50)}).save_to_disk(str(folder))
    return folder


def _image_folder(folder: Path) -> dict[str, object]:
    tree, heldout = (str(write_tree(folder / f"from{first}", class_files(first=first))) for first in (0, 50))
    return {"path": tree, "heldout": heldout, "flip": True}


def _latents(folder: Path) -> dict[str, object]:
    place = str(folder / "latents")
    encode(Path(place))
    return {"path": place, "heldout": place}


def _tars(folder: Path) -> dict[str, object]:
    for part in range(2):
        write_tar(folder / f"part-{part}.tar", keyed_files([0, 1, 1, 0], first=4 * part))
    write_tar(folder / "heldout" / "part.tar", keyed_files([0, 1, 1, 0] * 2, first=8))
    return {"path": str(folder / "part-{0..1}.tar"), "heldout": str(folder / "heldout"), "size": 8}


def _huggingface(folder: Path) -> dict[str, object]:
    return {"id": str(save_huggingface(folder / "saved", [0, 1, 1, 0, 1, 1]))}


def food_files() -> dict[str, bytes]:
    """Food-101 as torchvision unpacks it, of two classes and four images of each in both splits."""
    files = {}
    for first, split in ((0, "train"), (50, "test")):
        numbers = range(first, first + 4)
        names = {name: [f"{name}/{i}" for i in numbers] for name in CLASSES}
        files[f"food-101/meta/{split}.json"] = json.dumps(names).encode()
        files |= {f"food-101/images/{name}/{i}.jpg": encoded(pixels(i)) for name in CLASSES for i in numbers}
    return files


def _torchvision(folder: Path) -> dict[str, object]:
    return {"set": "food101", "path": str(write_tree(folder, food_files())), "flip": True}


# Of each entry, a function that makes an example in a folder and returns its options.
EXAMPLES: dict[str, Callable[[Path], dict[str, object]]] = {
    "digits": lambda folder: {},
    "huggingface": _huggingface,
    "image_folder": _image_folder,
    "latents": _latents,
    "tars": _tars,
    "torchvision": _torchvision,
}


def example(name: str, folder: Path) -> object:
    """A config of the entry `name` whose data are in `folder`, with the splits train and heldout."""
    assert name in EXAMPLES, f"the dataset {name} is registered without an example; add one to {__file__}"
    return DATASETS.config_class(name)(**EXAMPLES[name](folder))
