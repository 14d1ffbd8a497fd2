"""Fit the digits feature extractor on the split that exists for it, and report the scale of its distances.

The weights in the package are one run of this. A new run gives another feature space (training is not bit-stable across
machines): put its sha256 into dit_moe/extractors/digits_cnn.py, and compare only numbers made with the same sha256.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from dit_moe.data import DATASETS
from dit_moe.data.digits import DigitsConfig
from dit_moe.extractors.digits_cnn import fit
from dit_moe.metrics import FeatureMoments, frechet_distance
from dit_moe.randomness import generator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="where to write the weights, for instance digits_cnn64.safetensors")
    args = parser.parse_args()
    splits = {split: DATASETS.build(DigitsConfig(), split) for split in ("train", "heldout", "extractor")}
    images, labels = zip(*(split.__getitems__(range(len(split))).values() for split in splits.values()), strict=True)
    train, heldout, extractor = images
    network = fit(extractor, labels[2])
    weights = save(network.state_dict())
    args.out.write_bytes(weights)

    @torch.inference_mode()
    def distance(images_NCHW: Tensor) -> float:
        a, b = (FeatureMoments.of(network(each)[0]) for each in (images_NCHW, train))
        return frechet_distance(a.mean_D, a.covariance(), b.mean_D, b.covariance())

    random = generator("digits_cnn", "distortions")
    noisy = (heldout + 25 * torch.randn(heldout.shape, generator=random)).round().clamp(0, 255).byte()
    uniform = torch.randint(256, heldout.shape, generator=random, dtype=torch.uint8)
    with torch.inference_mode():
        accuracy = (network(heldout)[1].argmax(1) == labels[1]).double().mean().item()
    report = {
        "sha256": hashlib.sha256(weights).hexdigest(),
        "accuracy_heldout": accuracy,
        "fd_heldout": distance(heldout),
        "fd_noise_25": distance(noisy),
        "fd_one_class": distance(train[labels[0] == 3]),
        "fd_uniform_noise": distance(uniform),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
