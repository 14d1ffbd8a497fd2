"""A function of the user's as a feature space: ``--extractor package.module:function``."""

# B batch, C channels, H height, W width, D feature width

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor

from dit_moe.config import require
from dit_moe.extractors.base import EXTRACTORS, FeatureExtractor, Features
from dit_moe.extractors.precision import full_precision
from dit_moe.extractors.weights_file import sha256_of

PROBE = 2  # blank images that tell the width of the features


@dataclass(frozen=True, kw_only=True)
class FunctionConfig:
    """Which function. It takes uint8 images [B, C, H, W] and returns features [B, D], both tensors on one device."""

    path: str  # package.module:function
    weights: str | None = None  # file that the function reads: its hash is recorded and checked with the code's

    def __post_init__(self) -> None:
        named = re.fullmatch(r"[\w.]+:\w+", self.path) is not None
        require(named, self, "path", "must be package.module:function")


@EXTRACTORS.register("function", FunctionConfig)
class FunctionExtractor(FeatureExtractor):
    """Its name is ``function_<name>``, and its hash that of the file it is written in, not of what that imports.

    `dim` and `identity` are known once `check` has tried the function.

    Raises:
        ValueError: there is no such function, or a file of it cannot be read.
    """

    def __init__(self, config: FunctionConfig) -> None:
        module_name, _, name = config.path.partition(":")
        module = _import(module_name)
        self.path, self.function = config.path, _function(module, name)
        self.name, self.dim = f"function_{name}", 0
        self.device = torch.device("cpu")
        self.weights_sha256 = None if config.weights is None else sha256_of(Path(config.weights))
        if not getattr(module, "__file__", None):
            raise ValueError(f"--extractor {config.path}: {module_name} has no source file to tell it by; write one")
        self.sha256 = sha256_of(Path(str(module.__file__)))

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        return self

    def identity(self) -> dict[str, str | int]:
        assert self.dim, "check() finds the width of the features"
        weights = {} if self.weights_sha256 is None else {"weights_sha256": self.weights_sha256}
        return {**super().identity(), "path": self.path, **weights}

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Tries the function on blank images."""
        self.dim = self._features(torch.zeros(PROBE, *image_shape, dtype=torch.uint8)).shape[1]

    def __call__(self, images_BCHW: Tensor) -> Features:
        features_BD = self._features(images_BCHW)
        if self.dim not in (0, features_BD.shape[1]):
            raise self._wrong(f"returned {features_BD.shape[1]} features, and {self.dim} before")
        self.dim = features_BD.shape[1]
        return Features(features_BD)

    def _features(self, images_BCHW: Tensor) -> Tensor:
        with full_precision(self.device):
            found = self.function(images_BCHW.to(self.device))
            if not isinstance(found, Tensor):
                raise self._wrong(f"returned {type(found).__name__}")
            if found.ndim != 2 or len(found) != len(images_BCHW) or found.shape[1] == 0 or found.is_complex():
                raise self._wrong(f"returned {found.dtype} {list(found.shape)} for {list(images_BCHW.shape)}")
            features_BD = found.cpu() if found.dtype == torch.float64 else found.float().cpu()
        if not features_BD.isfinite().all():
            raise self._wrong("returned NaN or Inf")
        return features_BD

    def _wrong(self, found: str) -> ValueError:
        return ValueError(f"--extractor {self.path} {found}; it must return a tensor of finite numbers [B, D]")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks another
        raise ValueError(f"--extractor: there is no module {name}; put its folder on PYTHONPATH") from None


def _function(module: ModuleType, name: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if not callable(function):
        problem = "has no" if function is None else "is no function:"
        where = module.__file__ or module.__name__
        raise ValueError(f"--extractor {module.__name__}:{name}: {where} {problem} {name}; name a function in it")
    return function
