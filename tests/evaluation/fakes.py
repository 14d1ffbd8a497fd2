"""Small sources and extractors that need no network."""

import torch

from dit_moe.evaluation.sources.base import Source
from dit_moe.extractors import FeatureExtractor, Features


class NoiseSource(Source):
    """Grey noise; image i depends on i alone."""

    name = "noise"

    def __init__(self, count=100, side=4, channels=1, seed=0, labels=True):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randint(256, (count, channels, side, side), generator=generator).to(torch.uint8)
        self.image_shape = (channels, side, side)
        self.labels_N = torch.arange(count) % 10 if labels else None
        self.seed, self.asked, self.made = seed, [], 0

    def __len__(self):
        return len(self.images)

    def identity(self):
        return {"kind": "noise", "seed": self.seed}

    def facts(self):
        return {"note": "made up"}

    def batches(self, parts):
        for part in parts:
            self.asked += part
            self.made += len(part)
            yield self.images[list(part)]

    def take_counts(self):
        made, self.made = self.made, 0
        return {"pairs": 3 * made, "tokens": 2 * made}


class PixelExtractor(FeatureExtractor):
    """Features are a fixed linear map of the pixels, spatial ones the pixels."""

    name = "pixels"
    sha256 = "0" * 64
    has_logits = True
    has_spatial = True

    def __init__(self, pixels=16, dim=6, **facts):
        self.map = torch.randn(pixels, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.dim = dim
        self.__dict__.update(facts)

    def check(self, image_shape):
        if image_shape[0] * image_shape[1] * image_shape[2] != len(self.map):
            raise ValueError(f"pixels takes {len(self.map)} pixels, not {image_shape}; try --size")

    def __call__(self, images_BCHW):
        pixels = images_BCHW.flatten(1).double()
        return Features(pixels @ self.map, pixels[:, :5])

    def logits(self, features_ND):
        return features_ND
