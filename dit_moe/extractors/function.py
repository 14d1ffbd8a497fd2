"""A function of the user's as a feature space: ``--extractor package.module:function``."""

# B batch, C channels, H height, W width, D feature width

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
from torch import Tensor

from dit_moe.config import Place, require
from dit_moe.extractors.base import EXTRACTORS, FeatureExtractor, Features, full_precision
from dit_moe.files import sha256_of
from dit_moe.plugins import failure, import_named
from dit_moe.weights import sha256_of_weights

PROBE = 2  # blank images that tell the width of the features


@dataclass(frozen=True, kw_only=True)
class FunctionConfig:
    """Which function. It takes uint8 images [B, C, H, W] and returns features [B, D], both tensors on one device."""

    path: str  # package.module:function
    weights: Annotated[str, Place()] | None = None  # file that the function reads: its hash is recorded, too

    def __post_init__(self) -> None:
        named = re.fullmatch(r"[\w.]+:\w+", self.path) is not None
        require(named, self, "path", "must be package.module:function")


@EXTRACTORS.register("function", FunctionConfig)
class FunctionExtractor(FeatureExtractor):
    """Its name is ``function_<module>_<name>``; its hash, that of the file it is written in, not of what that imports.

    `dim` is 0 until it was called; so it has no part in the identity, which is the same before and after.

    Raises:
        ValueError: there is no such function, its module fails, or a file of it cannot be read.
    """

    def __init__(self, config: FunctionConfig) -> None:
        module_name, _, name = config.path.partition(":")
        module = import_named(module_name, f"--extractor {config.path}")
        self.path, self.function = config.path, _function(module, name)
        self.name, self.dim = "function_" + re.sub(r"\W", "_", config.path), 0
        self.weights_sha256 = None if config.weights is None else sha256_of_weights(Path(config.weights))
        if not getattr(module, "__file__", None):
            raise ValueError(f"--extractor {config.path}: {module_name} has no source file to tell it by; write one")
        self.file = Path(str(module.__file__))
        self.sha256 = sha256_of(self.file)

    def identity(self) -> dict[str, str | int]:
        weights = {} if self.weights_sha256 is None else {"weights_sha256": self.weights_sha256}
        return {"name": self.name, "sha256": self.sha256, "path": self.path, **weights}

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Tries the function on blank images. ValueError for whatever it raises."""
        try:
            self.dim = self._features(torch.zeros(PROBE, *image_shape, dtype=torch.uint8)).shape[1]
        except _Unusable:
            raise
        except Exception as error:
            images = f"{PROBE} blank images {'×'.join(map(str, image_shape))}"
            raise failure(f"--extractor {self.path} failed on {images}", error, self.file) from None

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

    def _wrong(self, found: str) -> _Unusable:
        return _Unusable(f"--extractor {self.path} {found}; it must return a tensor of finite numbers [B, D]")


def require_asked(config: object) -> None:
    """ValueError if the extractor of a run's config is a function: the command is to name it.

    To import its module is to run its code, and a run may come from anywhere.
    """
    if isinstance(config, FunctionConfig):
        problem = f"eval.extractor of the run is the function {config.path}, whose code would run"
        raise ValueError(f"{problem}; if you trust it, give --extractor {config.path}, otherwise another extractor")


class _Unusable(ValueError):
    """What the function returned."""


def _function(module: ModuleType, name: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if not callable(function):
        problem = "has no" if function is None else "is no function:"
        where = module.__file__ or module.__name__
        raise ValueError(f"--extractor {module.__name__}:{name}: {where} {problem} {name}; name a function in it")
    return function
