"""Weights for tests: of the right shapes, random, and scaled so that features differ between images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_moe.extractors import trained_cnn
from dit_moe.weights import sha256_of_tensors


def noise(count: int, side: int = 32, seed: int = 0) -> Tensor:
    """Smooth coloured noise of differing brightness and contrast, uint8 [N, 3, S, S]."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 5, 5, generator=random) * (20 + 40 * torch.rand(count, 1, 1, 1, generator=random))
    fine = 10 * torch.randn(count, 3, side, side, generator=random)
    grey = 80 + 90 * torch.rand(count, 3, 1, 1, generator=random)
    smooth = nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    return (grey + smooth + fine).round().clamp(0, 255).byte()


def save_random_inception(path: Path) -> Path:
    """Inception's weights as torch-fidelity wants them: on Kaiming's scale, with BatchNorm's statistics of one pass in
    training mode. pool3 features then have a mean near 0.4, as with the real ones; default weights give 1e-8."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchvision.models import inception_v3

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shapes = inception_v3(weights=None, aux_logits=False, num_classes=1008, init_weights=False)
        for module in shapes.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        shapes.fc.weight.data *= 10  # scores far enough apart for an Inception Score well above 1
    torch.save(shapes.state_dict(), path)
    network = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path=str(path)).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # keep the statistics of this pass alone
    for module in network.Mixed_7c.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.fill_(0.5)
    with torch.no_grad():
        network(noise(4, seed=1))
    torch.save(network.state_dict(), path)
    return path


def save_random_cnn(folder: Path, images: Tensor | None = None, labels: Tensor | None = None) -> Path:
    """A CNN that learned next to nothing, with its facts."""
    images = noise(8) if images is None else images
    network = trained_cnn.fit(trained_cnn.resized(images), labels, classes=2 if labels is not None else 4, steps=2)
    facts = trained_cnn.TrainedFacts(
        version=trained_cnn.VERSION,
        weights_sha256=sha256_of_tensors(network.state_dict()),
        channels=images.shape[1],
        learned="rotations" if labels is None else "classes",
        class_names=[] if labels is None else ["ant", "bee"],
        images=len(images),
        fingerprint=None,
        accuracy=None,
        heldout=0,
        seed=0,
    )
    trained_cnn.save(network, facts, folder)
    return folder


def random_dinov2(model: str = "vit_small_patch14_dinov2") -> dict[str, Tensor]:
    """DINOv2's weights under its own names. Blocks that scale what they add by 1e-5, as at its start, do nothing."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: Any = timm.create_model(model, pretrained=False, num_classes=0)
        weights = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
        for name, tensor in weights.items():
            if name.endswith(".gamma"):
                tensor.fill_(1)
        weights["pos_embed"].normal_(std=0.5)
    return {**weights, "mask_token": torch.zeros(1, network.num_features)}
