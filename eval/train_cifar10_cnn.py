"""Fit CIFAR-10's feature extractor on images reserved for it, and report its accuracy and the scale of its distances.

The weights in the package are one run of this on the first 2000 training images of each class. A new run gives another
feature space (training is not bit-stable across machines): put its sha256 into dit_moe/extractors/cifar10_cnn.py, and
compare only numbers made with the same sha256.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from dit_moe.data import DATASETS
from dit_moe.data.image_folder import ImageFolderConfig
from dit_moe.extractors import trained_cnn
from dit_moe.metrics import FeatureMoments, frechet_distance
from dit_moe.weights import sha256_of_tensors

STEPS = 5000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="CIFAR-10 in class folders, its files numbered within each: airplane/0007.jpg")
    parser.add_argument("out", type=Path, help="the folder to write, for instance cifar10_cnn64")
    args = parser.parse_args()
    config = ImageFolderConfig(path=args.images, heldout=0.1, reserve=0.2)
    splits = {split: DATASETS.build(config, split) for split in ("train", "heldout", "extractor")}
    rows = {split: dataset.__getitems__(range(len(dataset))) for split, dataset in splits.items()}
    images, labels = ({split: each[key] for split, each in rows.items()} for key in ("images", "labels"))
    images = {split: trained_cnn.resized(each) for split, each in images.items()}
    learned, names = images["extractor"], splits["extractor"].class_names
    mirrored, labels_N = torch.cat((learned, learned.flip(-1))), labels["extractor"].repeat(2)
    network = trained_cnn.fit(mirrored, labels_N, len(names), steps=STEPS).half().float()  # as it is stored
    accuracy = {split: trained_cnn.accuracy(network, each, labels[split]) for split, each in images.items()}
    facts = trained_cnn.TrainedFacts(
        version=trained_cnn.VERSION,
        weights_sha256=sha256_of_tensors(network.half().state_dict()),
        channels=3,
        learned="classes",
        class_names=list(names),
        images=len(learned),
        fingerprint=splits["extractor"].fingerprint,
        accuracy=accuracy["heldout"],
        heldout=len(images["heldout"]),
        seed=0,
    )
    trained_cnn.save(network, facts, args.out)
    train, heldout = (FeatureMoments.of(network.float()(images[split])[0].detach()) for split in ("train", "heldout"))
    floor = frechet_distance(train.mean_D, train.covariance(), heldout.mean_D, heldout.covariance())
    print(json.dumps({"sha256": facts["weights_sha256"], "accuracy": accuracy, "fd_heldout": floor}, indent=1))


if __name__ == "__main__":
    main()
