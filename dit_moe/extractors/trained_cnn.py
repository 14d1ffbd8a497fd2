"""The offline feature space of any images: a small CNN that learned from a split which nothing else uses.

It learned to tell their classes, or where there is one class only, by how many quarter turns an image was turned
(Gidaris et al., Unsupervised representation learning by predicting image rotations, 2018); and how much noise was mixed
into an image, for of what a network has never seen its features mean nothing. Every training makes another space, told
by a hash in its name: distances compare only within one.
"""

# N images, B batch, M images of it with noise, C channels, H height, W width, K classes

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_moe.config import Place
from dit_moe.extractors.base import EXTRACTORS, FeatureExtractor, Features, full_precision, misfit
from dit_moe.extractors.digits_cnn import distort
from dit_moe.files import atomic_folder
from dit_moe.json_files import Count, NonNegative, Sha256, Size, read_sealed, write_sealed
from dit_moe.weights import read_tensors, sha256_of_tensors

DIM = 64
SIDE = 32  # pixels that images are resized to
QUARTER_TURNS = 4
FEW_IMAGES = 200  # of fewer, a network learns little
STEPS, BATCH, LEARNING_RATE = 1000, 64, 2e-3
FEWEST_STEPS, MOST_PASSES = 100, 40  # over the images: of few, there is no more to learn
NOISY = BATCH // 4  # images of a batch that noise is mixed into
VERSION = 2  # of what `fit` does: 1 (before it was recorded) mixed in no noise
WEIGHTS, FACTS, FORMAT = "model.safetensors", "extractor.json", 1


class TrainedCNN(nn.Module):
    """Pixels 0..255, float32 [N, C, 32, 32] → features [N, 64] and logits [N, K].

    As in `DigitsCNN`, smooth activations and dropout keep features alive and unequal within a class.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.mean, self.std = (nn.Parameter(torch.ones(channels), requires_grad=False) for _ in range(2))
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.penultimate = nn.Linear(64 * (SIDE // 8) ** 2, DIM)
        self.classify = nn.Linear(DIM, classes)
        self.dropout = nn.Dropout(0.3)

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        x = (images_NCHW - self.mean[:, None, None]) / self.std[:, None, None]
        for convolve in (self.conv1, self.conv2, self.conv3):
            x = F.max_pool2d(F.silu(convolve(x)), 2)
        features = F.silu(self.penultimate(self.dropout(x.flatten(1))))
        return features, self.classify(self.dropout(features))


class TrainedFacts(TypedDict):
    """What extractor.json says of a network."""

    version: NotRequired[Size]  # of `fit`; none: 1
    weights_sha256: Sha256
    channels: Size
    learned: Literal["classes", "rotations"]
    class_names: list[str]  # empty if it learned rotations
    images: Size  # that it learned from
    fingerprint: str | None  # of their data set
    accuracy: NonNegative | None  # of the classes, or turns, of images that are held out; None: there are none
    heldout: Count  # how many
    seed: Count


@dataclass(frozen=True, kw_only=True)
class TrainedCNNConfig:
    """Which network: the folder that one was written to, `extractor` in a run folder."""

    weights: Annotated[str, Place()] | None = None  # None: that of the run that is evaluated


class TrainedCNNSpace(FeatureExtractor):
    """The feature space of a CNN, as far as it is known before that is trained; it cannot extract.

    Args:
        channels: of the images.
        class_names: of the classes that it learns to tell; empty if it learns rotations.
    """

    name, dim = "trained_cnn", DIM

    def __init__(self, channels: int, class_names: Sequence[str]) -> None:
        self.channels = channels
        self.has_logits, self.classes = bool(class_names), len(class_names) or None
        self.class_names = tuple(class_names) or None
        classifies = ("class_accuracy",) if class_names else ()
        self.metrics = ("fd", "kid", "precision_recall", *classifies, "nearest_neighbour")

    def check(self, image_shape: tuple[int, int, int]) -> None:
        if image_shape[0] != self.channels:
            problem = f"--extractor {self.name} takes images of {self.channels} channels, not {image_shape[0]}"
            raise ValueError(f"{problem}; give --channels {self.channels}")

    def __call__(self, images_BCHW: Tensor) -> Features:
        raise NotImplementedError("it is not trained")


@EXTRACTORS.register("trained_cnn", TrainedCNNConfig)
class TrainedCNNExtractor(TrainedCNNSpace):
    """Raises ValueError if the folder holds no network, or a damaged one."""

    def __init__(self, config: TrainedCNNConfig) -> None:
        if config.weights is None:
            remedy = "name its folder with --weights RUN/extractor"
            raise ValueError(f"--extractor trained_cnn: of which run? {remedy}")
        folder = Path(config.weights)
        remedy = "name the folder `extractor` of a run"
        if not (folder / FACTS).is_file():
            raise ValueError(f"--extractor trained_cnn: {folder} holds no {FACTS}; {remedy}")
        self.facts: TrainedFacts = read_sealed(folder / FACTS, TrainedFacts, FORMAT, remedy)
        tensors = read_tensors(folder / WEIGHTS, remedy)
        self.sha256 = sha256_of_tensors(tensors)
        if self.sha256 != self.facts["weights_sha256"]:
            problem = f"{folder / WEIGHTS} is not what {FACTS} beside it describes"
            raise ValueError(f"{problem}; restore both from a copy")
        names = self.facts["class_names"]
        network = TrainedCNN(self.facts["channels"], len(names) or QUARTER_TURNS)
        try:
            network.load_state_dict(tensors)
        except RuntimeError as error:
            raise misfit(folder / WEIGHTS, "a trained CNN", error) from None
        self.network = network.eval().requires_grad_(False)
        self.name = f"{self.name}{DIM}_{self.sha256[:8]}"
        super().__init__(self.facts["channels"], names)
        if (images := self.facts["images"]) < FEW_IMAGES:
            self.caveat = f"its features are of a CNN that learned from {images} images only: distances tell little"

    def __call__(self, images_BCHW: Tensor) -> Features:
        with full_precision(self.device):
            features_BD, _ = self.network(resized(images_BCHW.to(self.device)))
            return Features(features_BD.cpu())

    def logits(self, features_ND: Tensor) -> Tensor | None:
        if not self.has_logits:
            return None
        with full_precision(self.device):
            return self.network.classify(features_ND.to(self.network.classify.weight)).cpu()

    def identity(self) -> dict[str, str | int]:
        noise = " and noise" if self.facts.get("version", 1) > 1 else ""
        learned = f"{self.facts['learned']}{noise} of {self.facts['images']} images"
        return {**super().identity(), "learned": learned, "resize": f"bilinear, antialiased, to {SIDE}"}


def is_trained(folder: Path) -> bool:
    """Whether `save` wrote a network there."""
    return (folder / FACTS).is_file()


def save(network: TrainedCNN, facts: TrainedFacts, folder: Path) -> None:
    """Write a network that `fit` made. ValueError if there is something else in the folder."""
    with atomic_folder(folder) as made:
        safetensors.torch.save_file(network.state_dict(), made / WEIGHTS)
        write_sealed(made / FACTS, {"format": FORMAT, **facts})


def resized(images_NCHW: Tensor) -> Tensor:
    """uint8 images of any size → float32 [N, C, 32, 32], 0..255."""
    images_NCHW = images_NCHW.float()
    if images_NCHW.shape[-2:] == (SIDE, SIDE):
        return images_NCHW
    return F.interpolate(images_NCHW, (SIDE, SIDE), mode="bilinear", antialias=True)


def steps_for(images: int) -> int:
    """How many steps a network learns from so many images for."""
    return min(max(MOST_PASSES * images // BATCH, FEWEST_STEPS), STEPS)


def fit(
    images_NCHW: Tensor,
    labels_N: Tensor | None,
    classes: int = QUARTER_TURNS,
    *,
    steps: int = STEPS,
    seed: int = 0,
    advance: Callable[[int], object] = lambda steps: None,
) -> TrainedCNN:
    """Train a fresh network on the CPU; the same arguments and number of threads give the same weights.

    Args:
        images_NCHW: as `resized` gives them.
        labels_N: int64; None: by how many quarter turns an image is turned.
        classes: how many there are.
        steps: of `BATCH` images, distorted at random. Into `NOISY` of them noise is mixed, whose share is learned in
            place of the class, from features that so order images by it.
        seed: of everything that is random.
        advance: called with 1 after each step.
    """
    with torch.random.fork_rng(devices=[]):  # initialisers and dropout take no generator
        torch.manual_seed(seed)
        network = TrainedCNN(images_NCHW.shape[1], classes)
        network.mean.copy_(images_NCHW.mean((0, 2, 3)))
        network.std.copy_(images_NCHW.std((0, 2, 3)).clamp(min=1))
        share_of_noise = nn.Linear(DIM, 1)  # which nothing needs later
        learned = [each for part in (network, share_of_noise) for each in part.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE, weight_decay=0.5)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)
        for _ in range(steps):
            rows_B = torch.randint(len(images_NCHW), (BATCH,))
            images_BCHW = images_NCHW[rows_B]
            if labels_N is None:
                images_BCHW, wanted_B = turned(images_BCHW)
            else:
                wanted_B = labels_N[rows_B]
            images_BCHW, shares_M = distort(images_BCHW), torch.rand(NOISY)
            noisy_MCHW = mixed(images_BCHW[:NOISY], shares_M)
            features_BD, logits_BK = network(torch.cat((noisy_MCHW, images_BCHW[NOISY:])))
            told_M = share_of_noise(features_BD[:NOISY])[:, 0]
            optimizer.zero_grad()
            (F.cross_entropy(logits_BK[NOISY:], wanted_B[NOISY:]) + F.mse_loss(told_M, shares_M)).backward()
            optimizer.step()
            schedule.step()
            advance(1)
    return network.eval()


def mixed(images_MCHW: Tensor, shares_M: Tensor) -> Tensor:
    """Images 0..255 blended with noise, by turns that which sampling starts from, as images have it, and uniform."""
    noise_MCHW = 127.5 * torch.randn_like(images_MCHW)
    noise_MCHW[1::2] = 255 * torch.rand_like(images_MCHW[1::2]) - 127.5
    shares_M111 = shares_M[:, None, None, None]
    return (127.5 + (1 - shares_M111) * (images_MCHW - 127.5) + shares_M111 * noise_MCHW).clamp(0, 255)


def turned(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Square images, each turned by a number of quarter turns, and these numbers, int64 [B]: 0, 1, 2, 3, 0, …"""
    turns_B = torch.arange(len(images_BCHW)) % QUARTER_TURNS
    turned_BCHW = images_BCHW.clone()
    for turns in range(1, QUARTER_TURNS):
        turned_BCHW[turns_B == turns] = images_BCHW[turns_B == turns].rot90(turns, (2, 3))
    return turned_BCHW, turns_B


@torch.no_grad()
def accuracy(network: TrainedCNN, images_NCHW: Tensor, labels_N: Tensor | None) -> float:
    """Share of images, as `resized` gives them, whose class, or turn, a network tells."""
    right = 0
    for start in range(0, len(images_NCHW), BATCH):
        images_BCHW = images_NCHW[start : start + BATCH]
        if labels_N is None:
            images_BCHW, wanted_B = turned(images_BCHW)
        else:
            wanted_B = labels_N[start : start + BATCH]
        right += int((network(images_BCHW)[1].argmax(1) == wanted_B).sum())
    return right / len(images_NCHW)
