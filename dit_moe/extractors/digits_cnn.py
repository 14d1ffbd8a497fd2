"""The offline feature space: a small CNN for 8×8 digits, fitted on a split of them that is used for nothing else.

Enlarged digits are averaged back to 8×8 first, so they share the feature space of the originals.

Training is not bit-stable across machines, so the weights are committed and their hash is checked.
`eval/train_digits_cnn.py` made them by `fit`, which nothing else needs.
"""

# B batch, N images, C channels, H height, W width, D feature width, K classes

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_moe.extractors.base import EXTRACTORS, FeatureExtractor, Features

WEIGHTS = Path(__file__).parent / "weights" / "digits_cnn64.safetensors"
SHA256 = "9a0331d3f010acc9d10f445ba5c5e55a772e328cf0db2373da083e599736b907"
SIDE = 8  # pixels


class DigitsCNN(nn.Module):
    """Grey levels 0..255 [N, 1, 8, 8] → 64 features and 10 logits.

    Smooth activations and dropout keep all 64 features alive and unequal within a class: without them the network
    collapses a class to nearly a point, and its features hardly notice noise or blur.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.penultimate = nn.Linear(64 * 2 * 2, 64)
        self.classify = nn.Linear(64, 10)
        self.dropout = nn.Dropout(0.3)

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        x = F.silu(self.conv1(images_NCHW.to(self.conv1.weight.dtype) / 255))
        x = F.max_pool2d(F.silu(self.conv2(x)), 2)
        x = F.max_pool2d(F.silu(self.conv3(x)), 2)
        features = F.silu(self.penultimate(self.dropout(x.flatten(1))))
        return features, self.classify(self.dropout(features))


@dataclass(frozen=True, kw_only=True)
class DigitsCNNConfig:
    """No options: other weights would be another feature space, and need another name."""


@EXTRACTORS.register("digits_cnn64", DigitsCNNConfig)
class DigitsCNNExtractor(FeatureExtractor):
    """The committed network. Raises ValueError if its weights are not the ones whose hash is recorded here."""

    name = "digits_cnn64"
    dim = 64
    sha256 = SHA256
    included = True
    has_logits = True
    classes = 10
    class_names = tuple("0123456789")
    metrics = ("fd", "kid", "precision_recall", "class_accuracy", "nearest_neighbour")

    def __init__(self, config: DigitsCNNConfig) -> None:
        # float32 kernels differ with batch size, alignment and machine, and may round to TF32; in float64, which has no
        # such mode, the differences are far below any digit shown
        self.network = load(WEIGHTS, SHA256).double()

    def check(self, image_shape: tuple[int, int, int]) -> None:
        channels, height, width = image_shape
        if channels == 1 and height == width != 0 and height % SIDE == 0:
            return
        wanted = f"digits: square images of 1 channel whose side is a multiple of {SIDE}"
        size = f"--size {SIDE} (or another multiple of {SIDE}), or " if channels == 1 else ""
        problem = f"--extractor {self.name} takes {wanted}, not {channels}×{height}×{width}"
        raise ValueError(f"{problem}; give {size}another --extractor")

    def __call__(self, images_BCHW: Tensor) -> Features:
        self.check(tuple(images_BCHW.shape[1:]))  # type: ignore[arg-type]
        images = images_BCHW.to(self.device).double()
        with torch.inference_mode():
            features_BD, _ = self.network(F.avg_pool2d(images, images.shape[-1] // SIDE))
        return Features(features_BD.cpu())

    def logits(self, features_ND: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.network.classify(features_ND.to(self.network.classify.weight)).cpu()


def load(path: Path, sha256: str) -> DigitsCNN:
    """The network with the weights at `path`; ValueError unless the file's hash is `sha256`."""
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} has sha256 {found}, not {sha256}: features of other weights cannot be compared; restore the file"
        )
    network = DigitsCNN()
    network.load_state_dict(safetensors.torch.load(content))
    return network.eval()


def fit(images_NCHW: Tensor, labels_N: Tensor, *, steps: int = 2000, batch_size: int = 64, seed: int = 0) -> DigitsCNN:
    """Train a fresh network on uint8 images [N, 1, 8, 8] and their labels, distorted at random; under a minute."""
    with torch.random.fork_rng(devices=[]):  # initialisers and dropout take no generator
        torch.manual_seed(seed)
        network = DigitsCNN()
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.5)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
        for _ in range(steps):
            rows_B = torch.randint(len(images_NCHW), (batch_size,))
            _, logits_BK = network(distort(images_NCHW[rows_B].float()))
            optimizer.zero_grad()
            F.cross_entropy(logits_BK, labels_N[rows_B]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def distort(images_BCHW: Tensor) -> Tensor:
    """A random affine map near the identity for each image: small turns, scalings, shears, shifts up to 0.8 pixels."""
    maps_B23 = torch.eye(2, 3) + 0.2 * (2 * torch.rand(len(images_BCHW), 2, 3) - 1)
    grid_BHW2 = F.affine_grid(maps_B23, list(images_BCHW.shape), align_corners=False)
    return F.grid_sample(images_BCHW, grid_BHW2, align_corners=False)
