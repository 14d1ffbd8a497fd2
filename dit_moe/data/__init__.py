"""Datasets. A new one is a new file here: it registers itself and every contract test runs on it unasked."""

from dit_moe.data.base import DATASETS, BrokenImages, Dataset, NoSuchSplit
from dit_moe.registry import import_submodules

import_submodules(__name__, __path__)

__all__ = ["DATASETS", "BrokenImages", "Dataset", "NoSuchSplit"]
