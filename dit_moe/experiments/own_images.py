"""``recipe: own_images`` of a config: the settings that follow from the images, under what the config says itself.

They are chosen so that two CPU cores train and evaluate small images in minutes; with a GPU, networks are larger and
trainings longer.
"""

# N images

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from dit_moe import built_in, config
from dit_moe.config import ConfigError, Tree, merge, section, shown
from dit_moe.data import DATASETS
from dit_moe.data.image_source import ImageSource
from dit_moe.data.images import FORMATS, own_limits
from dit_moe.data.listing import SPLITS, note

KEY, NAME, CONFIG = "recipe", "own_images", "my_images"
LOOKED_AT = 200  # images whose size is looked at
MOST_IN_PIXELS = 64  # pixels on a side; larger images are trained on as latents
LATENTS_OF, MOST = 64, 256  # sides of images that are encoded: multiples of the one, at most the other
LATENT_CHANNELS = 4
FEW = 2000  # images; of fewer, larger shares are held out and reserved
FEWEST_WITH_SAMPLES = 200  # steps of a training that shows samples on its way; sampling takes long beside fewer
MOST_SAMPLES = 1000  # of a sampling seed
PLACES = {"huggingface": "id", "torchvision": "set"}  # options that say where images are, other than `path`
TRAINED_ON, HELD_OUT = ("train", "training"), ("val", "valid", "validation", "heldout", "test", "testing")


class Hardware(NamedTuple):
    """What a training can be on it."""

    depth: int
    width: int
    heads: int
    steps: int
    lr: float
    tokens: int  # of an image
    most: int  # pixels of images that an autoencoder is trained for
    autoencoder_steps: int


ON_CPU = Hardware(depth=4, width=96, heads=4, steps=1000, lr=2e-3, tokens=64, most=64, autoencoder_steps=600)
ON_GPU = Hardware(depth=12, width=384, heads=6, steps=40_000, lr=3e-4, tokens=256, most=256, autoencoder_steps=10_000)


@dataclass(frozen=True, kw_only=True)
class _Images:
    data: Annotated[Any, DATASETS]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Tree:
    """`config.load`, with the settings that a recipe stands for in its place; a folder of images is a config, too."""
    return expand(read(path, overrides))


def read(path: str | Path, overrides: Sequence[str] = ()) -> Tree:
    """The same with the recipe's name left in it, for `expand` or more changes."""
    path = built_in.find(path, kind="config, or a folder of images")
    if path.is_dir() and not (path / config.STORED).is_file():  # which a run folder has
        place = json.dumps(str(path), ensure_ascii=False)
        path, overrides = built_in.find(CONFIG), [f"data.path={place}", *overrides]
    return config.load(path, overrides)


def run_name(tree: Tree) -> str | None:
    """What the run of a config with this recipe is called, as its folder of images; None of any other config."""
    return _run_name(_named(tree.get("data"))) if tree.get(KEY) == NAME else None


def expand(tree: Tree) -> Tree:
    """A config without recipe, not yet typed; other configs come back as they are.

    ConfigError for another recipe, and if the images cannot be read.
    """
    given = dict(tree)
    recipe, images = given.pop(KEY, None), given.pop("data", {})
    if recipe is None:
        return tree
    if recipe != NAME:
        raise ConfigError(KEY, f"={shown(recipe)} is not known; there is {NAME}")
    images = _with_splits(_named(images))
    source = _open(images)
    count, side, hardware = len(source.labels_N), images.get("size") or _side(source), _hardware()
    shares = {"heldout": 0.1, "reserve": 0.1} if count >= FEW else {"heldout": 0.2, "reserve": 0.2}
    images = merge(shares, images)
    if side <= MOST_IN_PIXELS and "first_stage" not in given:
        side -= 0 if "size" in images else side % _patch(side, hardware)
        made_of, latent_side = {"data": images | {"size": side}}, side
    else:
        if "size" not in images:
            most = MOST if "first_stage" in given else hardware.most
            side = min(max(side // LATENTS_OF, 1) * LATENTS_OF, most)
        made_of, latent_side = _latents(images | {"size": side}, side, own="first_stage" not in given)
        if not {"first_stage", "first_stage_training"} & given.keys():  # costs are known before it is trained
            shape = {"in_channels": LATENT_CHANNELS, "input_size": latent_side, "num_classes": len(source.class_names)}
            made_of["model"] = shape
    what = "latents of images" if "encode" in made_of else "images"
    note(f"{source.place}: {count:,} images; the model is trained on {what} of {side}×{side} pixels")
    asked = given.get("train")
    steps = asked.get("steps") if isinstance(asked, dict) else None
    if not isinstance(steps, int) or steps < 1:  # a wrong one is refused where it is read
        steps = hardware.steps
    return merge(merge(_training(hardware, latent_side, count, steps), made_of), given)


def _named(images: Any) -> Tree:
    """The section `data` with a name and the place of the images. ConfigError if it says none."""
    images = merge({"name": "image_folder"}, {"name": images} if isinstance(images, str) else images or {})
    place = images.get(PLACES.get(str(images["name"]), "path"))
    if not isinstance(place, str) or not place:
        raise ConfigError("data.path", " is missing; name the folder of your images: dit-moe quickstart FOLDER")
    tars = place.endswith(".tar") and images["name"] == "image_folder"
    return images | ({"name": "tars"} if tars else {})


def _with_splits(images: Tree) -> Tree:
    """With the folders train and val of a folder that has nothing but splits, unless the section names another one."""
    folder = Path(str(images.get("path")))
    if images["name"] != "image_folder" or "heldout" in images or not folder.is_dir():
        return images
    names = {each.name.lower(): str(each) for each in folder.iterdir() if each.is_dir() and each.name[0] != "."}
    trained = [path for name, path in names.items() if name in TRAINED_ON]
    if len(trained) != 1 or not names.keys() <= SPLITS:
        return images
    heldout = next((names[name] for name in HELD_OUT if name in names), None)
    return images | {"path": trained[0]} | ({} if heldout is None else {"heldout": heldout})


def _open(images: Tree) -> ImageSource:
    """All images that are not held out elsewhere, undivided, and broken ones among them."""
    whole = {key: value for key, value in images.items() if key not in ("heldout", "reserve", "skip_broken")}
    described = config.build(_Images, {"data": whole}).data
    with section("data"):
        source = DATASETS.build(described, "train")
    if not isinstance(source, ImageSource):
        raise ConfigError("data.name", f"={images['name']} is no data set of image files, as {KEY}={NAME} takes them")
    return source


def _side(source: ImageSource) -> int:
    """Pixels of the shorter side: the median over some images, spread evenly."""
    sides = []
    for image in np.unique(np.linspace(0, len(source.labels_N) - 1, LOOKED_AT).astype(int)).tolist():
        with suppress(Exception), own_limits():  # a broken one is told when it is used
            sides.append(min(Image.open(io.BytesIO(source.read(image)), formats=FORMATS).size))
    if not sides:
        raise ConfigError("data", f": none of the images looked at in {source.place} can be read; mend them")
    return int(statistics.median_low(sides))


def _hardware() -> Hardware:
    return ON_GPU if torch.cuda.is_available() else ON_CPU


def _patch(side: int, hardware: Hardware) -> int:
    """Of the model: the smallest power of two with no more tokens an image than `hardware` is quick with."""
    patch = 1
    while (side // patch) ** 2 > hardware.tokens:
        patch *= 2
    return patch


def _latents(images: Tree, side: int, *, own: bool) -> tuple[Tree, int]:
    """The sections of a training on latents, and the latents' side; `own`: of an autoencoder that is trained first."""
    run = Path("runs", _run_name(images))
    sections: Tree = {
        "data": {"name": "latents", "path": str(run / "latents"), "heldout": str(run / "latents-heldout")},
        "encode": {"images": images, "flips": False},
        "first_stage": {"name": "autoencoder"},
    }
    if not own:
        return sections, side // 8  # as most autoencoders make of it: only the model's patch follows from it
    channels = [32, 64, 64] if side <= LATENTS_OF else [32, 64, 128, 128]
    sections["first_stage"]["model"] = str(run / "autoencoder")
    sections["first_stage_training"] = {
        "autoencoder": {
            "block_out_channels": channels,
            "layers_per_block": 1,
            "latent_channels": LATENT_CHANNELS,
            "norm_num_groups": 8,
            "attention": False,
        },
        "loss": {"kl_weight": 1e-4},
        "train": _schedule(_hardware().autoencoder_steps) | {"batch_size": 16, "lr": 2e-3},
    }
    return sections, side // 2 ** (len(channels) - 1)


def _training(hardware: Hardware, side: int, count: int, steps: int) -> Tree:
    """The network and its training, for inputs of so many pixels square and so many images."""
    size = f"DiT-custom/{_patch(side, hardware)}-8E2A"
    batch = min(128, 2 ** max(int(count * 0.6).bit_length() - 1, 0))
    return {
        "model": {"name": size, "depth": hardware.depth, "width": hardware.width, "heads": hardware.heads},
        "objective": {"name": "flow", "time": "logit_normal", "stratified": True},
        "train": _schedule(steps) | {"batch_size": batch, "lr": hardware.lr},
        "sample": {"sampler": {"name": "heun", "steps": 15}},
        "eval": {"seeds": 2, "images": MOST_SAMPLES if count // 10 > MOST_SAMPLES else None},
    }


def _schedule(steps: int) -> Tree:
    """Of a training of so many steps, as sections `train` have it."""
    quarter = max(steps // 4, 1)
    samples = quarter if steps >= FEWEST_WITH_SAMPLES else None
    often = {"log_every": max(steps // 1000, 1), "checkpoint_every": quarter, "sample_every": samples}
    return {
        "steps": steps,
        "warmup_steps": min(steps // 10, 1000),
        "schedule": "cosine",
        "grad_clip": 1.0,
        "ema_decay": 0.995,
    } | often


def _run_name(images: Tree) -> str:
    place = Path(str(images[PLACES.get(str(images["name"]), "path")]))
    name = (place.parent if place.name.lower() in TRAINED_ON else place).resolve().name
    return name.removesuffix(".tar") or NAME
