"""Small text, tokenizers and folders of tokens, made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from dit_moe.text.corpora import CORPORA
from dit_moe.text.token_shards import TokenManifest
from dit_moe.text.tokenization import Tokenization, TokenizeConfig, finished
from dit_moe.text.tokenizer import TokenizerConfig

WORDS = [
    "the",
    "router",
    "keeps",
    "an",
    "expert",
    "awake,",
    "naïve",
    "“queue”",
    "of",
    "∑",
    "漢字",
    "and\n\n\ttabs",
    "🦊",
]


def texts(count: int = 100, longest: int = 60, seed: int = 0) -> list[str]:
    """Documents of some words each, the third of them empty."""
    chance = random.Random(seed)
    made = [" ".join(chance.choices(WORDS, k=chance.randint(1, longest))) for _ in range(count)]
    return [text if number != 2 else "" for number, text in enumerate(made)]


def write_lines(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def corpus(name: str, **options: Any) -> Any:
    return CORPORA.config_class(name)(**options)


def config(path: Path, *, tokenizer: str = "bytes", shard_tokens: int = 1000, **options: Any) -> TokenizeConfig:
    """Of JSON lines in `path`."""
    source = corpus("jsonl", path=str(path), **options)
    return TokenizeConfig(corpus=source, tokenizer=TokenizerConfig(name=tokenizer), shard_tokens=shard_tokens)


def tokenization(folder: Path, documents: list[str] | None = None, **options: Any) -> Tokenization:
    """Of `documents`, which are left in a file beside the folder, into shards of 1000 tokens unless told otherwise."""
    path = folder.parent / "text.jsonl"
    if documents is not None or not path.exists():
        write_lines(path, texts() if documents is None else documents)
    return Tokenization(config(path, **options), folder, "train")


def tokenized(folder: Path, documents: list[str] | None = None, **options: Any) -> TokenManifest:
    return tokenization(folder, documents, **options).run()


def tokenize(config: TokenizeConfig, folder: Path, split: str) -> TokenManifest:
    """The tokens of a split, made if they are not there."""
    return finished(config, folder, split) or Tokenization(config, folder, split).run()


def save_bpe(folder: Path, vocab_size: int = 300, eos: str | None = "<|endoftext|>", **options: Any) -> Path:
    """A byte-level BPE like GPT-NeoX's, trained on the small texts, as AutoTokenizer loads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts(300), trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, **options).save_pretrained(folder)
    return folder
