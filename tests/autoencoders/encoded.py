"""Small folders of latents, made on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dit_moe.autoencoders.autoencoder import Autoencoder, AutoencoderConfig
from dit_moe.autoencoders.encoder import EncodeConfig, Encoder
from dit_moe.data import DATASETS, BrokenImages
from dit_moe.data.latents import Manifest
from tests.autoencoders.small import make

DIGITS = DATASETS.config_class("digits")(size=16)


@dataclass
class First:
    """The first `count` rows of a data set, so that little is encoded."""

    whole: object
    count: int

    def __post_init__(self) -> None:
        self.class_names, self.image_shape = self.whole.class_names, self.whole.image_shape
        self.fingerprint = None

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return self.whole.__getitems__(indices)


class WithBroken(First):
    """Some images cannot be read."""

    broken = (3, 7, 25)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        problems = {i: f"images/{i}.jpg is no image" for i in indices if i in self.broken}
        if problems:
            raise BrokenImages(problems)
        return super().__getitems__(indices)


def autoencoder(folder: Path, **options: object) -> Autoencoder:
    """A grey one with random weights; the same ones for the same options."""
    return Autoencoder(AutoencoderConfig(model=make(folder, in_channels=1, out_channels=1, **options)))


def encoder(folder: Path, *, stage: Autoencoder | None = None, dataset: object = None, **options: object) -> Encoder:
    """50 digits into shards of 20 in batches of 8, unless told otherwise."""
    config = EncodeConfig(**{"images": DIGITS, "shard_size": 20, "batch_size": 8} | options)
    stage = stage or autoencoder(folder.parent / "autoencoder")
    return Encoder(config, stage, dataset or First(DATASETS.build(DIGITS, "train"), 50), folder)


def encode(folder: Path, **options: object) -> Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    return encoder(folder, **options).run()
