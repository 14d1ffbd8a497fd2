"""Encoded latents, decoded: the best that a model of them can reach."""

# B batch, N images, C channels, H height, W width

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dit_moe import config as configs
from dit_moe.autoencoders.autoencoder import Autoencoder, AutoencoderConfig
from dit_moe.data.latents import LatentsConfig, LatentShards
from dit_moe.data.manifest import SHARDS
from dit_moe.distributed import join_processes
from dit_moe.evaluation.sources.base import Source

_DECIDES = ("kind", "channels", "sha256", "shift", "scale", "precision", "tiling")  # of the autoencoder's settings


def open_latents(folder: str | Path) -> LatentSource:
    """The images of a folder that `dit-moe encode` wrote.

    Raises ValueError: there are none, they are damaged, or their autoencoder cannot be had.
    """
    return LatentSource(LatentShards(LatentsConfig(path=str(folder), flip=False), "train"), name=str(folder))


class LatentSource(Source):
    """What the autoencoder of the latents makes of the mean of each entry, as it was encoded, not mirrored.

    Images are decoded one at a time: beside others, convolutions may round otherwise.
    """

    def __init__(self, dataset: LatentShards, name: str) -> None:
        assert not dataset.flip, "mirrored images are no others"
        self.dataset, self.name, self.image_shape = dataset, name, dataset.image_shape
        try:
            self.stage = _load(configs.build(AutoencoderConfig, dataset.manifest.autoencoder))
        except ValueError as error:
            remedy = "put it in that place again, or encode the images anew"
            raise ValueError(f"{dataset.folder}: its autoencoder cannot be loaded: {error}; {remedy}") from None

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def labels_N(self) -> Tensor:  # type: ignore[override]
        folder, found = self.dataset.folder / SHARDS, []
        for shard in self.dataset.manifest.shards:
            with safe_open(folder / shard.file, "pt") as file:
                found.append(file.get_tensor("labels"))
        return torch.cat(found)

    def identity(self) -> dict[str, Any]:
        """By the hashes of the shards, as their manifest has them, and of the autoencoder's weights."""
        settings = {name: value for name, value in configs.dump(self.stage.config).items() if name in _DECIDES}
        identity = {"kind": "latents", "fingerprint": self.dataset.fingerprint, "count": len(self)}
        return identity | {"autoencoder": settings}

    def facts(self) -> dict[str, Any]:
        return {"path": str(self.dataset.folder), "autoencoder": self.stage.config.model}

    @torch.no_grad()
    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        device = join_processes().device
        for part in parts:
            rows = self.dataset.__getitems__(part)
            mean_BCHW = self.stage.moments_of({"moments": rows["moments"].to(device)}).mean
            images_BCHW = torch.empty(len(part), *self.image_shape, dtype=torch.uint8)
            for image, latent in zip(images_BCHW, mean_BCHW, strict=True):
                image.copy_(self.stage.decode(latent[None])[0])
            yield images_BCHW


@lru_cache(maxsize=1)  # training and held-out latents share theirs
def _load(config: AutoencoderConfig) -> Autoencoder:
    stage = Autoencoder(config).to(join_processes().device)
    stage.load()
    return stage
