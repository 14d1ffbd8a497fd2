"""DINOv2, a feature space learned without labels: FD-DINOv2 follows human judgement more closely than FID does.

Source: Stein et al., Exposing flaws of generative model evaluation metrics, 2023. Images are resized and scaled as
EDM2 does it, in floating point, where Stein et al. let Pillow round. Numbers made here have not been compared with
published ones.
"""

# B batch, C channels, H height, W width, D feature width, P patches

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_moe.config import Place
from dit_moe.downloads import require_allowed, require_reachable
from dit_moe.extractors.base import (
    EXTRACTORS,
    OWN_WEIGHTS,
    FeatureExtractor,
    Features,
    full_precision,
    misfit,
    require_colour,
)
from dit_moe.weights import read_tensors, sha256_of_tensors

SIDE, PATCH = 224, 14  # pixels
OFFSET = 0.1  # patches by which DINOv2 overstates the side when it resamples its position embedding
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


@dataclass(frozen=True, kw_only=True)
class DINOv2Config:
    """Which network, and whose weights."""

    model: Literal[
        "vit_small_patch14_dinov2", "vit_base_patch14_dinov2", "vit_large_patch14_dinov2", "vit_giant_patch14_dinov2"
    ] = "vit_large_patch14_dinov2"  # timm's name
    weights: Annotated[str, Place()] | None = None  # file, DINOv2's own or timm's; None: timm's, downloaded if need be


@EXTRACTORS.register("dinov2", DINOv2Config)
class DINOv2Extractor(FeatureExtractor):
    """The normed class token [B, D] in fp32, of images resized to 224×224 (bicubic, antialiased).

    The hash of the weights is part of its name: that of the official ones is recorded nowhere, so numbers of any others
    would otherwise go by the same key.

    Raises:
        ValueError: the weights are missing, damaged, or of another network.
    """

    def __init__(self, config: DINOv2Config) -> None:
        network = _load(config, _downloaded(config) if config.weights is None else Path(config.weights))
        self.dim = network.num_features
        self.sha256 = sha256_of_tensors(network.state_dict())
        self.name = f"dinov2_vit{config.model[4]}14_{self.sha256[:8]}"
        embedding_1PD = resample(network.pos_embed.detach())
        network.set_input_size((SIDE, SIDE))  # resamples too, in timm's way
        network.pos_embed = nn.Parameter(embedding_1PD)
        self.network = network.eval().requires_grad_(False)

    def identity(self) -> dict[str, str | int]:
        return {**super().identity(), "resize": f"bicubic, antialiased, to {SIDE}, not rounded"}

    def check(self, image_shape: tuple[int, int, int]) -> None:
        require_colour(self.name, image_shape)

    def __call__(self, images_BCHW: Tensor) -> Features:
        with full_precision(self.device):
            return Features(self.network(preprocess(images_BCHW.to(self.device))).cpu())


def preprocess(images_BCHW: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] → what the network takes, float32 [B, 3, 224, 224]."""
    resized = F.interpolate(images_BCHW.float(), (SIDE, SIDE), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(each, device=resized.device).view(3, 1, 1) for each in (MEAN, STD))
    return (resized / 255 - mean) / std


def resample(embedding_1PD: Tensor) -> Tensor:
    """The position embedding of the class token and 37×37 patches → of it and 16×16 patches, as DINOv2 does it."""
    before, after = int((embedding_1PD.shape[1] - 1) ** 0.5), SIDE // PATCH
    grid = embedding_1PD[:, 1:].unflatten(1, (before, before)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(after + OFFSET) / before, mode="bicubic")
    return torch.cat([embedding_1PD[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _downloaded(config: DINOv2Config) -> Path:
    """timm's file in the cache of the Hub, put there if need be; ValueError if that cannot be done."""
    import timm
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    where: Any = {"repo_id": f"timm/{config.model}.lvd142m", "filename": "model.safetensors"}
    with suppress(LocalEntryNotFoundError):
        return Path(hf_hub_download(**where, local_files_only=True))
    problem = f": those of {config.model} are not here"
    require_allowed("weights", problem, "huggingface_hub", f"the Hugging Face Hub ({where['repo_id']})", OWN_WEIGHTS)
    try:
        require_reachable(constants.ENDPOINT)
        return Path(hf_hub_download(**where))
    except Exception as error:  # of many kinds, from the network to the disk
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        settings: Any = timm.get_pretrained_cfg(f"{config.model}.lvd142m")
        url: str = settings.url
        problem = f"{url.rpartition('/')[2]}, the weights of {config.model}, cannot be downloaded ({reason})"
        raise ValueError(f"{problem}; get it elsewhere from {url}, and name it with --weights FILE") from None


def _load(config: DINOv2Config, path: Path) -> Any:
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    tensors = read_tensors(path)
    network: Any = timm.create_model(config.model, pretrained=False, num_classes=0)
    try:
        network.load_state_dict(checkpoint_filter_fn(tensors, network))  # knows DINOv2's names
    except RuntimeError as error:
        raise misfit(path, config.model, error) from None
    return network
