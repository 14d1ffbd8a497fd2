"""A dataset of the Hugging Face Hub, a folder that `datasets` saved, or one of Parquet files. No code of it is run."""

# N images

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np

from dit_moe.config import ConfigError, NotThere, Place, require
from dit_moe.data.base import DATASETS, place_of
from dit_moe.data.image_source import ImageSource, ImageSourceConfig
from dit_moe.data.images import BadImage
from dit_moe.downloads import opening, require_allowed
from dit_moe.extras import how_to_install
from dit_moe.formatting import one_line
from dit_moe.registry import did_you_mean


@dataclass(frozen=True, kw_only=True)
class HuggingFaceConfig(ImageSourceConfig):
    """`train` and `heldout` name splits of the dataset; or `heldout` is a share of `train`."""

    id: Annotated[str, Place()]  # on the Hub, or a folder
    config_name: str | None = None  # if the dataset has several configurations
    train: str = "train"
    heldout: str | float | None = "validation"
    image: str | None = None  # column; None: the only one of images
    label: str | None = None  # column of class labels or whole numbers; None: the only one of class labels

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.heldout != self.train, self, "heldout", "is trained on; name another split, a share, or null")


@DATASETS.register("huggingface", HuggingFaceConfig)
class HuggingFace(ImageSource):
    """One split, which `datasets` keeps on disk and maps into memory. Its images are decoded as those of all sources.

    The fingerprint is of the labels and the sizes of the image files, in order.

    Raises:
        ValueError: no such split.
        ConfigError: `datasets` is not installed or cannot load the split, or columns or labels are missing.
    """

    def __init__(self, config: HuggingFaceConfig, split: str) -> None:
        option, name = place_of(config, split, "images", train="train")
        datasets = import_datasets()
        rows = load_split(config.id, config.config_name, option, name)
        image = _column(config, "image", rows.features, datasets.Image)
        label = _column(config, "label", rows.features, datasets.ClassLabel)
        try:  # rows of one column, each {"bytes": …, "path": …}
            files = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError):  # of `datasets` or Arrow
            raise ConfigError("image", f"={image} is not a column of images; name another") from None
        self._files, self._image, self.place = files, image, f"{config.id}, {name}"
        labels_N, sizes_N = _labels(label, rows), _sizes(image, files)
        listing = hashlib.sha256(labels_N.tobytes() + sizes_N.tobytes()).hexdigest()
        largest = labels_N.max()
        numbers = [str(i) for i in range(min(largest + 1, len(labels_N)))]  # names of classes that have none
        classes = getattr(rows.features[label], "names", None) or numbers
        if largest >= len(classes):
            problem = (
                f"={label} has the label {largest} in row {labels_N.argmax()}, but there are {len(classes)} classes"
            )
            raise ConfigError("label", f"{problem}; name a column of classes counted from 0, or mend the data")
        if split != "train":
            trained = HuggingFace(replace(config, skip_broken=False), "train").class_names
            if tuple(classes) != trained[: len(classes)]:
                problem = f"={name} has other classes than train={config.train}"
                raise ConfigError("heldout", f"{problem}; name a split with the same ones")
            classes = trained
        self._sizes_N, self._row_N = sizes_N, np.arange(len(sizes_N))
        super().__init__(config, split, labels_N, classes, listing)

    def keep(self, image_K: np.ndarray) -> None:
        super().keep(image_K)
        self._row_N, self._sizes_N = self._row_N[image_K], self._sizes_N[image_K]

    def sizes(self, images: Sequence[int]) -> np.ndarray:
        return self._sizes_N[images]

    def locate(self, image: int) -> str:
        path = self._file(image).get("path")
        return f"{self.place}, row {self._row_N[image]}{f' ({path})' if path else ''}"

    def key(self, image: int) -> bytes:
        return b"%d" % self._row_N[image]

    def _file(self, image: int) -> dict[str, Any]:
        return self._files[int(self._row_N[image])][self._image] or {}

    def read(self, image: int) -> bytes:
        file = self._file(image)
        if file.get("bytes") is not None:
            return file["bytes"]
        if not file.get("path"):
            raise BadImage("is null")
        with open(file["path"], "rb") as opened:
            return opened.read()


def import_datasets() -> Any:
    """The package; ConfigError if it is not installed."""
    try:
        import datasets
    except ImportError:
        problem = "=huggingface needs the package datasets, which is not installed"
        raise ConfigError("name", f"{problem}; {how_to_install('datasets')}") from None
    return datasets


def load_split(id: str, subset: str | None, option: str, split: str, streaming: bool = False) -> Any:
    """The split that `option` names, as a `datasets.Dataset`, or an `IterableDataset` if it is to be streamed.

    Raises ConfigError if it cannot be had.
    """
    datasets = import_datasets()
    saved = any(os.path.isfile(os.path.join(id, name)) for name in ("dataset_dict.json", "state.json"))
    try:
        if not saved:
            with opening(id):
                return datasets.load_dataset(id, subset, split=split, streaming=streaming)
        splits = datasets.load_from_disk(id)
    except Exception as error:  # of many kinds, from the network to Arrow
        told = one_line(str(error), 300)
        if not told.startswith(("Unknown split", "Bad split")):
            if not os.path.exists(id):
                remedy = "name a folder of Parquet files"
                require_allowed("id", f"={id} is no folder", "datasets", "the Hugging Face Hub", remedy)
            remedy = "name a dataset of the Hub, or a folder of Parquet files"
            if "zstd not supported" in told:
                remedy = how_to_install("zstandard")
            kind = ConfigError if os.path.exists(id) else NotThere  # without a network, perhaps
            raise kind("id", f"={id} cannot be loaded, split {split}: {told}; {remedy}") from None
        splits = dict.fromkeys(datasets.get_dataset_split_names(id, subset))
    splits = splits if isinstance(splits, dict) else {str(splits.split or "train"): splits}
    if split not in splits:
        raise ConfigError(option, f"={split} is no split of {id}; {did_you_mean(split, splits)}")
    return splits[split]


def _column(config: HuggingFaceConfig, option: str, features: Mapping[str, Any], kind: type) -> str:
    """The column that `option` names, or else the only one of a kind."""
    given = getattr(config, option)
    found = [given] if given is not None else [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        problem = f"=null, but {config.id} has {len(found) or 'no'} columns of the type {kind.__name__}"
        raise ConfigError(option, f"{problem}; name one of {', '.join(features)}")
    if found[0] not in features:
        raise ConfigError(option, f"={found[0]} is no column of {config.id}; {did_you_mean(found[0], features)}")
    return found[0]


def _labels(column: str, rows: Any) -> np.ndarray:
    """int64 [N]."""
    kind = str(getattr(rows.features[column], "dtype", "no numbers"))
    if not kind.startswith(("int", "uint")):
        raise ConfigError("label", f"={column} holds {kind}, not whole numbers; name another column")
    labels_N = _integers(rows, lambda table: table[column])
    if labels_N.min() < 0:
        problem = f"={column} has no label in row {labels_N.argmin()}"
        raise ConfigError("label", f"{problem}; name another column, or a split that has labels")
    return labels_N


def _integers(rows: Any, of: Callable[[Any], Any]) -> np.ndarray:
    """What `of` finds in Arrow tables of some rows each, int64 [N]; −1 for null. Takes no other memory."""
    import pyarrow.compute as pc

    chunks = [pc.fill_null(of(table), -1).to_numpy() for table in rows.with_format("arrow").iter(10_000)]
    return np.concatenate(chunks).astype(np.int64)


def _sizes(column: str, files: Any) -> np.ndarray:
    """Bytes of each image, [N]; −1 for one that is not among the rows but in a file."""
    import pyarrow.compute as pc

    return _integers(files, lambda table: pc.binary_length(pc.struct_field(table[column], "bytes")))
