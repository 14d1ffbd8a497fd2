"""LPIPS, the perceptual distance in the features of VGG16 (Zhang et al. 2018), from weights on the disk.

Its two files keep the names and the places that torch gives them when it downloads them:

    vgg16-397923af.pth        https://download.pytorch.org/models/vgg16-397923af.pth
    weights-vgg16-lpips.pth   https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth

so a machine on which torch-fidelity has measured LPIPS has them in ~/.cache/torch/hub/checkpoints.
"""

# B batch, C channels, H height, W width

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from dit_moe.config import ConfigError
from dit_moe.weights import read_tensors

VGG, LINEAR = "vgg16-397923af.pth", "weights-vgg16-lpips.pth"
REMEDY = "get it as dit_moe/autoencoders/lpips.py says, or set lpips_weight=0"
WIDTHS = (64, 128, 256, 512, 512)
CUTS = (0, 4, 9, 16, 23, 30)  # of VGG16's layers, behind the last activation before each pooling
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and std for pixels in [−1, 1]


class LPIPS(nn.Module):
    """(a, b) → distances [B], for images in [−1, 1] with 3 channels, or 1, which is taken for grey."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.vgg import cfgs, make_layers

        layers = list(make_layers(cfgs["D"]).children())
        self.slices = nn.ModuleList(nn.Sequential(*layers[start:stop]) for start, stop in pairwise(CUTS))
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(1, width, 1, 1)) for width in WIDTHS)
        self.shift, self.scale = (nn.Buffer(torch.tensor(each).view(1, 3, 1, 1)) for each in (SHIFT, SCALE))
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, folder: str | Path) -> LPIPS:
        """The network with the weights in `folder`; ConfigError naming the file that is missing or of another kind."""
        network = cls()
        vgg, linear = (_read(Path(folder).expanduser() / name) for name in (VGG, LINEAR))
        try:
            for slice_, start in zip(network.slices, CUTS, strict=False):
                for name, parameter in slice_.named_parameters():
                    layer, _, kind = name.partition(".")
                    parameter.copy_(vgg[f"features.{start + int(layer)}.{kind}"])
            for i, parameter in enumerate(network.weights):
                parameter.copy_(linear[f"lin{i}.model.1.weight"])
        except (KeyError, RuntimeError) as error:
            problem = f"{folder} holds other weights than LPIPS's ({error})"
            raise ConfigError("lpips_folder", f": {problem}; {REMEDY}") from None
        return network

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        total, a, b = a_BCHW.new_zeros(len(a_BCHW)), self._prepared(a_BCHW), self._prepared(b_BCHW)
        for slice_, weight in zip(self.slices, self.weights, strict=True):
            a, b = slice_(a), slice_(b)
            total = total + (weight * (_unit(a) - _unit(b)).square()).sum(1).mean((1, 2))
        return total

    def _prepared(self, images_BCHW: Tensor) -> Tensor:
        return (images_BCHW.expand(-1, 3, -1, -1) - self.shift) / self.scale


def _unit(features_BCHW: Tensor) -> Tensor:
    # vector_norm has a gradient where all features are 0, which a square root has not
    return features_BCHW / (torch.linalg.vector_norm(features_BCHW, dim=1, keepdim=True) + 1e-10)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path, REMEDY)
    except ValueError as error:
        raise ConfigError("lpips_folder", f": {error}") from None
