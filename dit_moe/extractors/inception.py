"""The network that FID is defined by: the Inception of 2015-12-05, behind TensorFlow 1's resize.

torch-fidelity has the network and the resize; its weights are read and checked here, and no code in their file is run.
"""

# B batch, N images, C channels, H height, W width, D feature width, K classes

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from dit_moe.config import Place
from dit_moe.downloads import NotDownloaded
from dit_moe.extractors.base import (
    EXTRACTORS,
    FeatureExtractor,
    Features,
    NotFetched,
    fetch,
    full_precision,
    misfit,
    require_colour,
)
from dit_moe.weights import read_tensors, sha256_of_weights

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # of torch-fidelity's 95,628,359 bytes
DIM = 2048
RESIZE = "TensorFlow 1 bilinear to 299"
SPATIAL_CHANNELS = 7  # of Mixed_6d's 1×1 branch: 17·17·7 = 2023 numbers, about as many as pool3 has (ADM's evaluator)
ROWS = 4096  # features whose logits are computed at a time


@dataclass(frozen=True, kw_only=True)
class InceptionConfig:
    """Whose weights."""

    weights: Annotated[str, Place()] | None = None  # file; None: torch hub's copy, downloaded if need be
    verify: bool = True  # refuse all weights but the official ones


@EXTRACTORS.register("inception", InceptionConfig)
class InceptionExtractor(FeatureExtractor):
    """pool3 features [B, 2048], and spatial ones [B, 2023] for sFID, in fp32.

    With other weights, which `verify` allows, it is another feature space and bears another name.

    Raises:
        ValueError: the weights are missing, damaged, of another network, or not the official ones.
    """

    dim = DIM
    has_spatial = True
    has_logits = True  # of 1008 classes in TensorFlow's order, which is that of no data set's labels
    metrics = ("fd", "sfd", "inception_score", "kid", "precision_recall")

    def __init__(self, config: InceptionConfig) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        path = fetch(URL_INCEPTION_V3, SHA256) if config.weights is None else Path(config.weights)
        self.sha256 = sha256_of_weights(path)
        self.is_fid = self.sha256 == SHA256
        if config.verify and not self.is_fid:
            problem = f"{path} has sha256 {self.sha256}, the Inception that defines FID has {SHA256}"
            remedy = f"replace it by {URL_INCEPTION_V3}, or give --any-weights to get numbers that are not called fid"
            raise ValueError(f"{problem}; {remedy}")
        self.name = "inception" if self.is_fid else f"inception_{self.sha256[:8]}"
        self.network = _load(path)
        self._class_weight_DK = self.network.fc.weight.double().T

    def identity(self) -> dict[str, str | int]:
        return {**super().identity(), "resize": RESIZE}

    def check(self, image_shape: tuple[int, int, int]) -> None:
        require_colour(self.name, image_shape)

    def __call__(self, images_BCHW: Tensor) -> Features:
        seen: list[Tensor] = []
        branch = self.network.Mixed_6d.branch1x1
        with full_precision(self.device), branch.register_forward_hook(lambda *call: seen.append(call[-1])):
            (pooled_BD,) = self.network(images_BCHW.to(self.device))
            spatial_BHWC = seen[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)  # TensorFlow's order
            return Features(pooled_BD.cpu(), spatial_BHWC.flatten(1).cpu())

    def logits(self, features_ND: Tensor) -> Tensor:
        """Without the bias, as the Inception Score has them; float32 [N, 1008]."""
        parts = features_ND.cpu().split(ROWS)
        return torch.cat([(part.double() @ self._class_weight_DK).float() for part in parts])


def missing_weights() -> str | None:
    """Why the official weights cannot be had, in a few words; None if they are here, where they are put if need be."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    try:
        fetch(URL_INCEPTION_V3, SHA256)
    except NotFetched as error:
        return f"Inception's weights cannot be downloaded ({error.reason})"
    except NotDownloaded as error:
        return str(error)
    return None


def _load(path: Path) -> Any:
    """torch-fidelity's network with the weights of a file.

    It only takes weights from a file, which it unpickles, and with it any code in there: so it gets one written here.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = io.BytesIO()
    torch.save(read_tensors(path), file)
    file.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=file)
    except RuntimeError as error:
        raise misfit(path, "Inception", error) from None
