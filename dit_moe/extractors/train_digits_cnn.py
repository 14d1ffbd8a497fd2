"""How the weights of `digits_cnn` are fitted; `eval/train_digits_cnn.py` does it, nothing else needs to."""

# N images, K classes, B batch, C channels, H height, W width

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_moe.extractors.digits_cnn import DigitsCNN


def fit(images_NCHW: Tensor, labels_N: Tensor, *, steps: int = 2000, batch_size: int = 64, seed: int = 0) -> DigitsCNN:
    """Train a fresh network on uint8 images [N, 1, 8, 8] and their labels, distorted at random; under a minute."""
    with torch.random.fork_rng(devices=[]):  # initialisers and dropout take no generator
        torch.manual_seed(seed)
        network = DigitsCNN()
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.5)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
        for _ in range(steps):
            rows_B = torch.randint(len(images_NCHW), (batch_size,))
            _, logits_BK = network(_distort(images_NCHW[rows_B].float()))
            optimizer.zero_grad()
            F.cross_entropy(logits_BK, labels_N[rows_B]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def _distort(images_BCHW: Tensor) -> Tensor:
    """A random affine map near the identity for each image: small turns, scalings, shears, shifts up to 0.8 pixels."""
    maps_B23 = torch.eye(2, 3) + 0.2 * (2 * torch.rand(len(images_BCHW), 2, 3) - 1)
    grid_BHW2 = F.affine_grid(maps_B23, list(images_BCHW.shape), align_corners=False)
    return F.grid_sample(images_BCHW, grid_BHW2, align_corners=False)
