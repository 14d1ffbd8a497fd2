"""Mean and std of raw latents: as encoding measures them, and in files of them for `normalization: statistics`."""

# n rows, F flips, M moments, C channels, H height, W width of latents

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dit_moe.config import ConfigError
from dit_moe.weights import read_tensors

if TYPE_CHECKING:
    from dit_moe.autoencoders.autoencoder import AutoencoderConfig

OPTION = "first_stage.statistics"


def channel_statistics(moments: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Per channel, over stored moments [n, F, M, C, H, W]: sums of the mean and of the second moment of a draw.

    NumPy adds in the same order whatever the number of threads.
    """
    sums, squares = np.zeros((2, moments.shape[3]))
    for part in moments.split(64):  # in float64 a whole shard would be large
        first, *rest = part.double().numpy().swapaxes(0, 2)
        sums += first.sum((0, 1, 3, 4))
        squares += sum((std**2 for std in rest), first**2).sum((0, 1, 3, 4))
    return sums, squares


def mean_and_std(parts: Sequence[tuple[Any, Any]], values: int) -> tuple[np.ndarray, np.ndarray]:
    """Per channel, of `values` numbers whose sums and second moments are the sums of these `parts`."""
    mean_C, square_C = np.sum(np.asarray(parts, dtype=np.float64), axis=0) / values
    return mean_C, np.sqrt(np.maximum(square_C - mean_C**2, 0))


def read_statistics(path: str | Path) -> tuple[Tensor, Tensor]:
    """``mean`` and ``std`` of a .safetensors or .pt file, fp32, [C, 1, 1] or [C, H, W].

    They may have a leading dimension of 1, and of channels the last two may be missing: LightningDiT's
    ``latents_stats.pt`` is such a file. ConfigError for anything else.
    """
    remedy = f"name a file with mean and std of the latents by {OPTION}"
    try:
        found = read_tensors(Path(path), remedy)
    except ValueError as error:
        raise ConfigError(OPTION, f"={path}: {error}") from None
    missing = {"mean", "std"} - found.keys()
    if missing:
        raise ConfigError(OPTION, f"={path} holds no {' and no '.join(sorted(missing))}; {remedy}")
    mean, std = (_per_place(found[name]) for name in ("mean", "std"))
    if mean.ndim != 3 or mean.shape != std.shape:
        shapes = " and ".join(str(list(found[name].shape)) for name in ("mean", "std"))
        raise ConfigError(OPTION, f"={path} holds mean and std of the shapes {shapes}; both must be [C] or [C, H, W]")
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise ConfigError(OPTION, f"={path} holds numbers that are not finite, or a std that is not above 0; {remedy}")
    return mean, std


def _per_place(tensor: Tensor) -> Tensor:
    tensor = tensor.squeeze(0) if tensor.ndim == 4 else tensor
    return (tensor[:, None, None] if tensor.ndim == 1 else tensor).float()


def with_statistics(config: AutoencoderConfig) -> AutoencoderConfig:
    """The config with what its file of statistics holds: of channels as shift and scale, of places as their hash.

    ConfigError for a file that cannot be read, or that is not the recorded one.
    """
    if config.statistics is None:
        return config
    mean, std = read_statistics(config.statistics)
    if mean.shape[1:] == (1, 1):
        shift, scale = (tuple(each.double().flatten().tolist()) for each in (mean, 1 / std.double()))
        return replace(config, statistics=None, shift=shift, scale=scale)
    sha256 = hashlib.sha256(b"".join(each.contiguous().numpy().tobytes() for each in (mean, std))).hexdigest()
    if config.statistics_sha256 not in (None, sha256):
        problem = f"={config.statistics} holds others than those recorded, {config.statistics_sha256[:12]}"
        raise ConfigError(OPTION, f"{problem}; name the file that the latents were normalised by")
    return replace(config, statistics_sha256=sha256)


def require_fit(path: str, latent_shape: tuple[int, int, int]) -> None:
    """ConfigError for a file of statistics of latents of another shape."""
    found, wanted = read_statistics(path)[0].shape, latent_shape
    if found not in ((wanted[0], 1, 1), wanted):
        shown = "×".join(map(str, wanted))
        raise ConfigError(OPTION, f"={path} is of latents {list(found)}, and these are {shown}; name the file of these")
