"""What a feature extractor is: a fixed network whose features are compared, and the file of its weights.

Weights are told by their hash, and fetched once by however many processes.
"""

# B batch, N images, C channels, H height, W width, D feature width, S spatial feature width, K classes

from __future__ import annotations

import fcntl
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from dit_moe.downloads import require_allowed, require_reachable
from dit_moe.registry import Registry

OWN = "package.module:function of your own"


def section_of(text: str) -> dict[str, str]:
    """The section of a config that `text` stands for: a name, or package.module:function; see `Registry`."""
    if re.fullmatch(r"[\w.]+:\w+", text):
        return {"name": "function", "path": text}
    module, _, function = text.replace(":", ".").rpartition(".")
    if module:
        raise ValueError(f"it is neither a name nor a function of a module; if it is one, write {module}:{function}")
    return {"name": {"cifar10_cnn": "cifar10_cnn64", "digits_cnn": "digits_cnn64"}.get(text, text)}


EXTRACTORS = Registry("feature extractor", section_of)
UNKNOWN_EXTRACTOR = "unverified"  # the name of the space of statistics that do not say which network made them


class Features(NamedTuple):
    """Features [B, D] and, from extractors that have them, spatial ones [B, S]; float32 or float64, on the CPU."""

    features_BD: Tensor
    spatial_BS: Tensor | None = None


class FeatureExtractor(ABC):
    """uint8 images → `Features`. An image's features depend on it alone, but for rounding."""

    name: str
    """The name of the feature space. The key of every number has it: ``fd_<name>``."""
    dim: int
    """D; 0 while that is not known."""
    sha256: str
    """Of the weights that span the space."""
    is_fid: bool = False
    """Whether a Fréchet distance here is *the* FID: the verified Inception network of 2015, and nothing else."""
    included: bool = False
    """Whether its weights come with the package."""
    has_spatial: bool = False
    has_logits: bool = False
    classes: int | None = None
    """How many classes its logits have, if they are the labels of the data; None if they are in another order."""
    class_names: tuple[str, ...] | None = None
    """Of these classes, in their order, where they are known."""
    metrics: tuple[str, ...] = ("fd", "kid", "precision_recall", "nearest_neighbour")
    """What is measured in this space unless the user says otherwise; names of METRICS."""
    caveat: str | None = None
    """What every reader of numbers in its space should know."""
    network: Any = None
    """The module that computes the features, if it is one."""
    device = torch.device("cpu")
    """Where features are computed."""

    @abstractmethod
    def check(self, image_shape: tuple[int, int, int]) -> None:
        """ValueError, with a remedy, unless it takes images of this shape (C, H, W)."""

    @abstractmethod
    def __call__(self, images_BCHW: Tensor) -> Features:
        """Features of one batch of uint8 images, wherever it is; without gradients."""

    def logits(self, features_ND: Tensor) -> Tensor | None:
        """Class scores [N, K] that follow from features alone; None if it classifies nothing."""
        return None

    def to(self, device: torch.device | str) -> Self:
        """Compute on `device` from now on."""
        self.device = torch.device(device)
        if self.network is not None:
            self.network.to(device)
        return self

    def identity(self) -> dict[str, str | int]:
        """All that decides its features, JSON-ready. Results record it; kept features are used only if it is equal."""
        return {"name": self.name, "dim": self.dim, "sha256": self.sha256}


def key_of(measure: str, extractor_name: str, is_fid: bool) -> str:
    """The name that a number of `measure` goes by: "fid" in the verified Inception's space, else "fd_<extractor>"."""
    if is_fid:
        return {"fd": "fid", "sfd": "sfid"}.get(measure, measure)
    return f"{measure}_{extractor_name}"


def require_colour(name: str, image_shape: tuple[int, int, int]) -> None:
    """ValueError, with a remedy, unless images have 3 channels."""
    if image_shape[0] != 3:
        problem = f"--extractor {name} takes images of 3 channels, not {image_shape[0]}"
        raise ValueError(f"{problem}; give --channels 3")


class StatisticsOnly(FeatureExtractor):
    """The feature space of files of statistics where there are no images; it cannot extract.

    Args:
        identity: of the extractor that the files name; None if none names one.
        dim: the width of their means.
        is_fid: whether that identity is the verified Inception's.
        has_spatial: whether all files have moments of spatial features, too.
    """

    def __init__(self, identity: Mapping[str, Any] | None, dim: int, is_fid: bool, has_spatial: bool) -> None:
        self.has_spatial, self.metrics = has_spatial, ("fd", "sfd") if has_spatial else ("fd",)
        self._identity = dict(identity or {"name": UNKNOWN_EXTRACTOR, "dim": dim, "sha256": ""})
        self.name, self.sha256, self.dim = self._identity["name"], self._identity["sha256"], dim
        self.is_fid = is_fid and identity is not None

    def identity(self) -> dict[str, str | int]:
        return self._identity

    def check(self, image_shape: tuple[int, int, int]) -> None:
        raise NotImplementedError("statistics have no images")

    def __call__(self, images_BCHW: Tensor) -> Features:
        raise NotImplementedError("statistics have no images")


# ----------------------------------------------------------------------------------------------------- files of weights


def misfit(path: Path, network: str, error: RuntimeError) -> ValueError:
    """What to raise where `load_state_dict` refused the weights of `path`."""
    details = " ".join(str(error).partition("\n")[2].split()) or str(error)
    return ValueError(f"{path} does not hold the weights of {network} ({details[:200]} …); name --weights that do")


OWN_WEIGHTS = "name a file that has them"


class NotFetched(ValueError):
    """A file that is not here; `reason` says in a few words why it could not be downloaded."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def fetch(url: str, sha256: str) -> Path:
    """The file of `url` in torch hub's cache, put there if need be; NotFetched, or NotDownloaded, if it is not there.

    It appears there whole and with the right hash, or not at all; one process downloads while the others wait.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.is_file():
        return path
    require_allowed("weights", f": {path.name} is not in {path.parent}", "torch", url, OWN_WEIGHTS)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{path.name}.lock").open("a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however that ends
            if not path.is_file():  # else another process was faster
                require_reachable(url)
                torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, HTTPException, RuntimeError) as error:  # the last is about the hash
        problem = f"{path.name} is neither in {path.parent} nor can it be downloaded ({error})"
        raise NotFetched(
            f"{problem}; get it elsewhere from {url}, and name it with --weights FILE", str(error)
        ) from None
    return path


# ------------------------------------------------------------------------------------------------------ full precision


@contextmanager
def full_precision(device: torch.device | str) -> Iterator[None]:
    """fp32 means fp32: no TF32 or bf16 within matrix products and convolutions, no autocast. And no gradients."""
    backends: Any = torch.backends
    settings = backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.mkldnn.conv
    older, before = _older_switch(), [each.fp32_precision for each in settings]
    try:
        torch.set_float32_matmul_precision("highest")  # for torch refuses switches that contradict each other
        for each in settings:
            each.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(older)
        for each, precision in zip(settings, before, strict=True):
            each.fp32_precision = precision


def _older_switch() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer ones were set beside it, and so it was left at its default
        return "highest"
