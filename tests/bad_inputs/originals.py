"""Good files of every kind, small, from which bad ones are made."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from dit_moe.config import load
from tests.autoencoders.small import make as make_autoencoder
from tests.cli.conftest import CONFIG, SMALL
from tests.cli.language import LM_CONFIG, small

Run = Callable[..., int]  # a command's words → its exit code

LATENT_CONFIG = str(Path(CONFIG).with_name("digits_latent.yaml"))


def make(folder: Path, run: Run) -> None:
    """Fill `folder`; `run` calls a command in a process of its own."""
    _images(folder)
    _text(folder)
    make_autoencoder(folder / "autoencoder")
    (folder / "digits.yaml").write_text(_resolved(CONFIG, SMALL))
    changes = [word for word in small(folder) if not word.startswith("sample.prompts")]
    (folder / "lm.yaml").write_text(_resolved(LM_CONFIG, changes))
    encode = [f"data.path={folder}/latents", f"first_stage.model={folder}/autoencoder", "encode.shard_size=10"]
    encode += [f"encode.images={{name: image_folder, path: {folder}/images, size: 16}}", "encode.batch_size=8"]
    (folder / "latent.yaml").write_text(_resolved(LATENT_CONFIG, [*SMALL, *encode]))
    judged = ["eval", folder / "samples/images.npz", "--metrics", "fd"]
    for words in (
        ["train", folder / "digits.yaml", "--run", folder / "run"],
        ["sample", folder / "run", "--save", "npz,png", "--out", folder / "samples"],
        [*judged, "digits/heldout", "--out", folder / "metrics.json", "--features", folder / "features"],
        [*judged, "digits", "--save-stats", folder / "statistics.npz"],
        ["encode", folder / "latent.yaml"],
        ["quickstart", folder / "lm.yaml", "--run", folder / "lm"],
    ):
        assert run(*words) == 0, words


def _resolved(config: str | Path, changes: list[str]) -> str:
    """The text of a config file with the changes in it."""
    return OmegaConf.to_yaml(OmegaConf.create(load(config, changes)))


def _images(folder: Path) -> None:
    chance = np.random.default_rng(0)
    for label in ("cats", "dogs"):
        (folder / "images" / label).mkdir(parents=True)
        for number in range(6):
            pixels = chance.integers(0, 256, (20, 18, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / label / f"{number}.{'png' if number % 2 else 'jpg'}")
    with tarfile.open(folder / "images.tar", "w") as tar:
        for number, path in enumerate(sorted((folder / "images").rglob("*.*g"))):
            tar.add(path, f"{number:03d}{path.suffix}")
            (folder / "label").write_text(str(number % 2))
            tar.add(folder / "label", f"{number:03d}.cls")


def _text(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    lines = [json.dumps({"text": f"the cat number {number} sat on the mat"}) for number in range(20)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(lines, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(str(folder / "tokenizer"))
