"""A registered dataset: the images that a model was trained on, and those that were held out; latents are decoded."""

# B batch, N images, C channels, H height, W width

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dit_moe import config as configs
from dit_moe.autoencoders.autoencoder import Autoencoder, AutoencoderConfig
from dit_moe.data import DATASETS, BrokenImages, Dataset
from dit_moe.data.batch_sampler import load_batches
from dit_moe.data.held_out import names_heldout, require_held_out
from dit_moe.data.image_source import ImageSource
from dit_moe.data.images import FORMATS, BadImage
from dit_moe.data.latents import LatentsConfig, LatentShards
from dit_moe.data.listing import facts_of_listing
from dit_moe.data.shares import DOING
from dit_moe.distributed import join_processes
from dit_moe.evaluation.sources.base import EvaluationInput, ReadOptions, Source, sha256_of_labels
from dit_moe.formatting import first_few

LATER = {("orientation", None)}  # options that came later, which are no part of the identity where they have this value
# Options without a part in the identity: where the images lie, which are refused, and what is not used here.
NOT_IN_IDENTITY = (
    *("path", "heldout", "reserve", "id", "min_side", "max_megapixels", "flip", "fingerprint"),
    *("skip_broken", "allow_empty"),
)
LEAVE_OUT = "leave it out by '{name: image_folder, path: …, skip_broken: true}'"
AUTOENCODER_IDENTITY = ("kind", "channels", "sha256", "shift", "scale", "precision", "tiling")
ROWS_AT_A_TIME = 256  # that are read for their labels, or to be hashed
LOOKED_AT = 20  # images whose format is looked at
READ_AT_MOST = 100_000  # images whose content is hashed: of ImageNet's it would be hours


def open_dataset(config: Any, split: str = "train", options: ReadOptions | None = None) -> EvaluationInput:
    """The images of a split, each once, never mirrored; beside those of training the held-out ones.

    Encoded latents are decoded. A config that leaves the size open takes `options.size`.

    Raises what building the dataset raises. `heldout` is None if there are no held-out images, or if those that the
    config names by default cannot be opened; `no_heldout` says which.
    """
    options = options or ReadOptions()
    source = _source(config, split, options)
    if split != "train":
        return EvaluationInput(source, no_heldout=f"the reference is itself the split {split}")
    heldout, why_not = open_heldout(config, options)
    if heldout is not None:
        require_held_out(source.dataset, heldout.dataset)
    return EvaluationInput(source, heldout=heldout, no_heldout=why_not)


def open_heldout(config: Any, options: ReadOptions) -> tuple[DatasetSource | LatentSource | None, str]:
    """The held-out images of a dataset, each once; or None, and why there are none. Raises as `open_dataset` does."""
    if getattr(config, "heldout", ...) is None:
        return None, "the data name no held-out images; say where they are, or give a share of all, heldout=0.1"
    try:
        return _source(config, "heldout", options), ""
    except ValueError as error:
        if names_heldout(config):
            raise
        return None, str(error)


def open_latents(folder: str | Path) -> LatentSource:
    """The images of a folder that `dit-moe encode` wrote.

    Raises ValueError: there are none, they are damaged, or their autoencoder cannot be loaded.
    """
    return LatentSource(LatentShards(LatentsConfig(path=str(folder), flip=False), "train"), name=str(folder))


def _source(config: Any, split: str, options: ReadOptions) -> DatasetSource | LatentSource:
    names = {field.name for field in fields(config)}
    if "flip" in names:
        config = replace(config, flip=False)
    if options.size and "size" in names and config.size is None:
        config = replace(config, size=options.size)
    dataset = DATASETS.build(config, split)
    if isinstance(dataset, LatentShards):
        return LatentSource(dataset, name=f"{dataset.folder}, decoded")
    return DatasetSource(dataset, config, split, options.workers)


class DatasetSource(Source):
    """The images of a dataset, in its order.

    Args:
        dataset: of images.
        config: what it was built from.
        split: of it.
        workers: processes that read ahead.
    """

    def __init__(self, dataset: Dataset, config: Any, split: str, workers: int = 0) -> None:
        self.dataset, self.config, self.split, self.workers = dataset, config, split, workers
        self.name = _name_of(dataset, DATASETS.name_of(config), split)
        self.image_shape, self.class_names = dataset.image_shape, tuple(dataset.class_names)

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def labels_N(self) -> Tensor:  # type: ignore[override]
        if (known := getattr(self.dataset, "labels_N", None)) is not None:
            return torch.as_tensor(known, dtype=torch.int64)
        return torch.cat([self.dataset.__getitems__(part)["labels"] for part in self._parts()])

    def identity(self) -> dict[str, Any]:
        """Of the content of all images; of more than `READ_AT_MOST`, of their names, sizes and times of change.

        Reads them all, once. ValueError if one cannot be read.
        """
        options = configs.dump(self.config).items()
        config = {name: value for name, value in options if name not in NOT_IN_IDENTITY and (name, value) not in LATER}
        identity = {"kind": "dataset", "name": DATASETS.name_of(self.config), "config": config, "split": self.split}
        labels_sha256 = sha256_of_labels(self.labels_N)
        return identity | {"sha256": self._sha256, "labels_sha256": labels_sha256, "count": len(self)}

    def facts(self) -> dict[str, Any]:
        compared_by = {"compared_by": "listing"} if self._is_large else {}
        stored: dict[str, Any] = (
            {"stored": {"formats": _formats(self.dataset)}} if isinstance(self.dataset, ImageSource) else {}
        )
        return {"config": configs.dump(self.config)} | compared_by | stored | facts_of_listing(self.dataset)

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Raises ValueError naming all images of a batch that are broken."""
        return images_of(self.dataset, parts, self.workers)

    def _parts(self) -> list[list[int]]:
        rows = range(len(self))
        return [list(rows[i : i + ROWS_AT_A_TIME]) for i in range(0, len(rows), ROWS_AT_A_TIME)]

    @property
    def _is_large(self) -> bool:
        return len(self) > READ_AT_MOST

    @cached_property
    def _sha256(self) -> str:
        digest, dataset = hashlib.sha256(), self.dataset
        if self._is_large:
            digest.update(str(dataset.fingerprint).encode())
            if isinstance(dataset, ImageSource):
                for stamp in dataset.stamps():
                    digest.update(b"%d %d " % stamp)
        elif isinstance(dataset, ImageSource):
            for image in range(len(self)):
                digest.update(hashlib.sha256(_content(dataset, image)).digest())
        else:
            for images_BCHW in self.batches(self._parts()):
                digest.update(images_BCHW.contiguous().numpy().tobytes())
        return digest.hexdigest()


def _name_of(dataset: Dataset, kind: str, split: str) -> str:
    """Images of the user's own go by where they are; if several splits are there, by which of them they are, too."""
    place = getattr(dataset, "place", None)
    if not place:
        return f"{kind}/{split}"
    return f"{place} ({DOING[split]})" if getattr(dataset, "split_counts", None) else place


def _formats(dataset: ImageSource) -> list[str]:
    """Of the files of some images, spread evenly, that are kept as they are: what is lost is not seen once reduced."""
    count, found = len(dataset.labels_N), set()
    for image in range(0, count, max(1, count // LOOKED_AT)) if dataset.config.size is None else ():
        with suppress(Exception):  # is told when the image is used
            found.add(Image.open(io.BytesIO(dataset.read(image)), formats=FORMATS).format or "")
    return sorted(found)


def _content(dataset: ImageSource, image: int) -> bytes:
    try:
        return dataset.read(image)
    except (OSError, BadImage) as error:
        problem = f"{dataset.locate(image)} cannot be read ({getattr(error, 'strerror', None) or error})"
        raise ValueError(f"{problem}; mend it, or {LEAVE_OUT}") from None


def images_of(dataset: Any, parts: Sequence[Sequence[int]], workers: int) -> Iterator[Tensor]:
    """The images of these rows, part by part. ValueError naming all images of a part that are broken."""
    try:
        for rows in load_batches(dataset, [list(part) for part in parts], workers):
            yield rows["images"]
    except BrokenImages as error:
        problems = list(dict.fromkeys(error.problems.values()))
        raise ValueError(f"{first_few(problems)}; mend what is broken, or {LEAVE_OUT}") from None


class LatentSource(Source):
    """What the autoencoder of latents makes of the mean of each entry, as it was encoded, not mirrored.

    This is the best that a model of the latents can reach. Images are decoded one at a time: in a batch, convolutions
    may round differently.
    """

    def __init__(self, dataset: LatentShards, name: str) -> None:
        assert not dataset.flip, "each image once"
        self.dataset, self.name, self.image_shape = dataset, name, dataset.image_shape
        self.class_names = tuple(dataset.class_names)
        try:
            self.stage = _load(configs.build(AutoencoderConfig, dataset.manifest.autoencoder))
        except ValueError as error:
            remedy = "put it in that place again, or encode the images again"
            raise ValueError(f"{dataset.folder}: its autoencoder cannot be loaded: {error}; {remedy}") from None

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def labels_N(self) -> Tensor:  # type: ignore[override]
        return torch.from_numpy(self.dataset.labels_N)

    def identity(self) -> dict[str, Any]:
        """By the hashes of the shards, as their manifest has them, and of the autoencoder's weights."""
        settings = configs.dump(self.stage.config)
        autoencoder = {name: value for name, value in settings.items() if name in AUTOENCODER_IDENTITY}
        latents = {"kind": "latents", "fingerprint": self.dataset.fingerprint, "count": len(self)}
        return latents | {"autoencoder": autoencoder}

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
