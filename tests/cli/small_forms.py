"""What makes a shown command small: words behind its own, and a folder with the data and runs that it begins from."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.autoencoders.small import make
from tests.cli.conftest import cli
from tests.formats.files import BUNDLED, HEADS, of_training
from tests.shown import ROOT, blocks

SHORT = ["train.steps=2", "train.checkpoint_every=2", "train.warmup_steps=0", "train.sample_every=null"]
NARROW = ["model.width=32", "model.heads=2"]
DIGITS = [
    *SHORT,
    *NARROW,
    "model.name=DiT-custom/4-8E2A",
    "train.batch_size=8",
    "sample.sampler.steps=2",
    "eval.images=10",
    "eval.seeds=1",
]
IMAGENET = [*SHORT, *NARROW, "model.name=DiT-custom/2-4E2A", "model.depth=1", "model.input_size=4"]
IMAGENET += ["model.num_classes=2", "train.batch_size=4", "train.micro_batch=2", "train.workers=0"]
IMAGENET += ["first_stage.model=autoencoder", "encode.images.size=16", "encode.workers=0"]
TEXT = [*SHORT, *NARROW, "model.name=LM-custom-4E2A", "model.depth=1", "data.length=64", "train.batch_size=4"]
TEXT += ["tokenize.corpus={name: files, path: text, heldout_every: 3}", "sample.max_new_tokens=4"]
TEXT += ["eval.stride=16", "eval.light_every=null"]
AUTOENCODER = [*SHORT[:3], "train.batch_size=4", "data.size=8", "autoencoder.block_out_channels=[8, 8, 8]"]
SAMPLES, PASSAGE = ["count=6", "sampler.steps=3"], ["max_new_tokens=4"]

BEFORE = (  # what the guides' other commands begin from
    ("train", "configs/digits.yaml"),
    ("train", "configs/digits.yaml", "model.moe.router=topk", "train.lr=1e-3", "--run", "runs/topk"),
    ("sample", "runs/digits", "target=2"),
    ("eval", "runs/digits", "--out", "runs/digits/metrics.json"),
    ("encode", "configs/imagenet256/base.yaml"),
    ("train", "configs/imagenet256/DiT-XL-2-8E2A.yaml", "--run", "runs/imagenet256/DiT-XL-2-8E2A"),
    ("tokenize", "configs/lm_tiny.yaml"),
    ("train", "configs/lm_tiny.yaml"),
    ("train", "configs/lm_tiny.yaml", "--run", "runs/olmoe", "model.moe.router={name: topk, renormalize: false}"),
    ("export", "runs/lm_tiny", "exported/lm_tiny"),
    ("export", "runs/olmoe", "exported/olmoe", "--olmoe"),
)
COPIES = {  # what a reader would have from elsewhere, or from longer commands
    "runs/digits_topk": "runs/digits",
    "runs/digits_dense": "runs/digits",
    "runs/compare-digits/dtopp/seed-1": "runs/digits",
    "runs/compare-digits/topk/seed-1": "runs/topk",
    "runs/imagenet256/DiT-B-2-8E2A": "runs/digits",
    "runs/imagenet256/DiT-XL-2": "runs/imagenet256/DiT-XL-2-8E2A",
    "elsewhere/heldout": "runs/lm_tiny/tokens/heldout",
    "allenai/OLMoE-1B-7B-0924": "exported/olmoe",
    "seed0.npz": "runs/digits/images.npz",
    "seed1.npz": "runs/digits/images.npz",
    "runs/xl/fid.json": "runs/digits/metrics.json",
    "runs/imagenet256/DiT-XL-2-8E2A/fid.json": "runs/digits/metrics.json",
}


def smaller(words: Sequence[str]) -> list[str]:
    """What to put behind a command's words for its smallest form: of two values for one thing, the last one counts."""
    command, subject = words[0], words[1] if len(words) > 1 else ""
    text, shown = "lm_tiny" in subject, " ".join(words)
    if command in ("train", "quickstart", "encode", "tokenize"):
        longer = ["train.steps=5", "--profile", "1"] if "--profile" in words else []
        return [] if "--dry-run" in words else TEXT if text else _of_images(subject, shown) + longer
    if command == "train-autoencoder":
        return AUTOENCODER
    if command == "compare":  # all of it is read and planned, and nothing trained
        return ["--out", "runs/none", *([] if "--report" in words else ["--list"])]
    if command == "sample":
        return PASSAGE if text else [*SAMPLES, *(["labels=[0, 1]"] if "labels=[" in shown else [])]
    if command == "eval":
        return [*SAMPLES, "--seeds", "1"] if Path(subject).is_dir() else []
    if command == "import":
        return [HEADS, *BUNDLED]
    if command == "upcycle":
        return ["--name", "DiT-custom/4-8E2A"]
    if command == "routing":
        return ["--tokens", "64"] if text else ["--images", "10", "--times", "2"]
    if command == "dial":
        samples = [] if "--no-metric" in words else [*SAMPLES, "--seeds", "1"]
        return [*samples, "--targets", "2", "--images", "4", "--draws", "1"]
    return []


def _of_images(subject: str, shown: str) -> list[str]:
    if "imagenet" not in subject:
        return DIGITS
    if "data={name: image_folder" in shown:
        return [*(word for word in IMAGENET if not word.startswith("encode.")), "data.size=16"]
    # Not where the guide has them: --dry-run would find other sizes than those that its configs state.
    return IMAGENET if "data.path=" in shown else [*IMAGENET, "data.path=latents"]


def run(words: Sequence[str]) -> int:
    """Exit code of `dit-moe words…` in its smallest form, with names of files as the shell completes them."""
    completed = [each for word in words for each in (sorted(glob.glob(word)) or [word])]
    return cli(*completed, *smaller(completed))


def furnish(folder: Path) -> None:
    """Make `folder`, which is the working folder, one in which the guides' commands find what they begin from."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name in ("README.md", "docs"):
        (folder / name).symlink_to(ROOT / name)
    (study,) = (block for block in blocks(ROOT / "docs" / "studies.md", "yaml") if block.startswith("title:"))
    (folder / "my_study.yaml").write_text(study)
    (folder / "my_router.py").touch()  # the router of the guide is there already
    make(folder / "autoencoder")
    for name in ("DiT-XL-2-256x256.pt", "checkpoint.pt"):
        of_training(folder / name, "dit")
    places = {"data/imagenet/train": 3, "data/flowers/train": 3, "photos": 20}  # images of each class
    for place, each in places.items():
        for label in ("cats", "dogs"):
            (folder / place / label).mkdir(parents=True)
            for number in range(each):
                pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / place / label / f"{number}.png")
    (folder / "text").mkdir()
    for number in range(6):
        (folder / "text" / f"{number}.txt").write_text(
            f"The cat number {number} sat on a mat, and so did another. " * 4
        )
    (folder / "runs" / "none").mkdir(parents=True)
    for words in BEFORE:
        assert run(words) == 0, words
    for place, origin in COPIES.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if Path(origin).is_dir() else shutil.copyfile)(folder / origin, folder / place)
