"""Options that a command does not have and that are keys of its config: how these are written."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence

from dit_moe.schema import keys_called

_RUN_CONFIGS = ("dit_moe.experiments.image:Experiment", "dit_moe.experiments.text:TextExperiment")
_OF_TRAINING: dict[str, tuple[str, ...]]
_OF_TRAINING = dict.fromkeys(("train", "quickstart", "encode", "tokenize", "compare"), _RUN_CONFIGS)
_OF_TRAINING["train-autoencoder"] = ("dit_moe.tasks.autoencoder:AutoencoderTraining",)
_OF_RUNS = ("dit_moe.sampling.generator:SampleConfig", "dit_moe.experiments.text:TextSampleConfig")
SHORT = {"n": "count"}  # as other programs call them


def written_as_keys(command: str, words: Sequence[str], options: Sequence[str]) -> Iterator[str]:
    """Of each option among the words that the command does not have, how it is written, if it is a key of its config.

    Args:
        command: of `dit-moe`, whose words come behind it.
        options: that it has, and takes as they are.
    """
    for i, word in enumerate(words):
        name, has_value, value = word.partition("=")
        if word == "--":
            return
        if not name.startswith("-") or name in options:
            continue
        key = name.lstrip("-").replace("-", "_")
        classes = [_load(each) for each in _OF_TRAINING.get(command, _OF_RUNS)]
        found = keys_called(SHORT.get(key, key), classes)
        if found:
            following = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else "…"
            given, value = (word, value) if has_value else (f"{word} {following}", following)
            yield f"{given}; write {' or '.join(f'{key}={value}' for key in found[:3])}"


def _load(name: str) -> type:
    module, _, attribute = name.partition(":")
    found: type = getattr(importlib.import_module(module), attribute)
    return found
