"""Tokenizers: bytes, which need no file, or any that `transformers.AutoTokenizer` loads."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit_moe.config import ConfigError, shown
from dit_moe.downloads import opening, require_allowed
from dit_moe.files import atomic_folder, everything
from dit_moe.formatting import one_line
from dit_moe.json_files import parse

BYTES = "bytes"
LARGEST_ID, LARGEST_FILE = 2**24, 2**28  # of a vocabulary, and of tokenizer.json in bytes: the largest known / 10
MOST_GROWTH = 64  # of a text by what is replaced in it: the known ones write a few characters for one
MEND = "mend its tokenizer.json, or name another tokenizer"
END_OF_TEXT = "<|endoftext|>"  # of the bytes; the name that GPT-2 gave it
FILES = (  # and folders that `save_pretrained` of some version writes, beside those that a tokenizer names itself
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer to use."""

    name: str = BYTES  # or what AutoTokenizer loads: an id of the Hugging Face Hub, or a folder
    sha256: str | None = None  # (recorded) of its vocabulary and rules, wherever they lie


class Document(NamedTuple):
    """A tokenised document: its ids, without special ones, and how many bytes its text has in UTF-8."""

    ids: Sequence[int] | np.ndarray
    bytes: int


class TextTokenizer:
    """Text to token ids and back. `open_tokenizer` makes one.

    Nothing is added to a text, and one that spells a special token is encoded as the plain text that it is.
    """

    def __init__(self, config: TokenizerConfig, hf: Any) -> None:
        self.hf = hf  # a transformers.PreTrainedTokenizerFast, or a slow one where there is no other
        self.name = config.name
        self.eos: int = hf.eos_token_id
        self.unknown: int | None = hf.unk_token_id  # stands for what is not in the vocabulary
        self.vocab_size: int = max(hf.get_vocab().values()) + 1  # ids are below it
        self._backend = _plain_backend(hf) if hf.is_fast else None
        self.config = replace(config, sha256=self._identity())

    def encode(self, text: str) -> list[int]:
        """The ids of one text, [n]."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, whole numbers [n]. All cores work on them."""
        if self.name == BYTES:  # a hundred times faster than BPE, which has no merges to make here
            return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]
        with _rust_errors(lambda told: ValueError(f"the tokenizer {self.name} cannot encode the text: {told}; {MEND}")):
            if self._backend is None:
                each = [self.hf.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts]
            else:
                each = [found.ids for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        return [np.array(ids, dtype=np.uint32) for ids in each]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; special tokens as they are spelt, bytes that are not UTF-8 as U+FFFD."""
        plain = np.asarray(ids, dtype=np.int64).tolist()
        return self.hf.decode(plain, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def decode_batch(self, batch: Sequence[np.ndarray]) -> list[str]:
        """The texts of ids, as `decode` gives each."""
        if self.name == BYTES:
            return [ids.astype(np.uint8).tobytes().decode(errors="replace") for ids in batch]
        if self._backend is None:
            return [self.decode(ids) for ids in batch]
        return self._backend.decode_batch([ids.tolist() for ids in batch], skip_special_tokens=False)

    def decode_plain(self, ids: np.ndarray) -> str:
        """The text of ids, without special tokens."""
        return self.hf.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save(self, folder: Path) -> None:
        """Write what AutoTokenizer needs to load it, without any code of ours."""
        self.hf.save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name for what 4 has too
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")

    def keep(self, folder: Path, *, replace: bool) -> None:
        """Put into `folder` what `save` writes, whole or not at all, unless all of it is there.

        With `replace` an earlier copy, which the caller knows to be ours, is replaced. ValueError if anything else
        would be lost.
        """
        with tempfile.TemporaryDirectory() as temporary:
            self.save(Path(temporary))
            if _content(Path(temporary)).items() <= _content(folder).items():
                return
        with atomic_folder(folder, self._foreign if replace else everything) as unfinished:
            self.save(unfinished)

    def _foreign(self, folder: Path) -> list[str]:
        """What in a folder is not a file of a tokenizer."""
        own = {*FILES, *self.hf.vocab_files_names.values()}
        return sorted(name for name in _content(folder) if Path(name).parts[0] not in own)

    def _identity(self) -> str:
        """A hash of what decides the ids of a text: not of the path, nor of what is put around texts elsewhere."""
        content: dict[str, Any] = {"eos": self.eos, "class": type(self.hf).__name__, "vocab": self.hf.get_vocab()}
        if self._backend is not None:
            whole = json.loads(self._backend.to_str())
            content = {key: whole[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "decoder")}
            # Options that are off are left out: later versions of `tokenizers` know of more of them.
            content["model"] = {key: value for key, value in whole["model"].items() if value not in (None, False, "")}
            content["eos"] = self.eos
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_remote(config: TokenizerConfig) -> bool:
    """Whether it takes the network, or its cache, to open the tokenizer."""
    return config.name != BYTES and not os.path.exists(config.name)


def open_tokenizer(
    config: TokenizerConfig, folder: Path | None = None, remedy: str = "restore it from a copy"
) -> TextTokenizer:
    """The tokenizer that `config` names; with a `folder`, the copy of it that was saved there.

    Raises ConfigError if it cannot be loaded, has no end-of-text token, or differs from the recorded one; for a copy,
    a ValueError that names the folder and the `remedy`.
    """

    def fault(problem: str, advice: str = "") -> ValueError:
        if folder is None:
            return ConfigError("name", f"={shown(config.name)} {problem}; {advice}")
        return ValueError(f"{folder}, the copy of the tokenizer {shown(config.name)}, {problem}; {remedy}")

    import transformers

    place = config.name if folder is None else str(folder)
    if folder is not None and not folder.is_dir():
        raise fault("is missing")
    if place != BYTES and (found := _unfit(Path(place))) is not None:
        raise fault(*found)
    try:
        hf = _bytes_tokenizer() if place == BYTES else _load(transformers.AutoTokenizer, place)
        tokenizer = None if hf.eos_token_id is None else TextTokenizer(config, hf)
    except Unloadable as error:
        if folder is None and is_remote(config):
            remedy = "name a folder that holds a tokenizer"
            require_allowed("name", f"={place} is no folder", "transformers", "the Hugging Face Hub", remedy)
        local = "mend the folder, or name another that holds a tokenizer"
        hub = (
            f"name a folder that holds a tokenizer, {BYTES!r}, or an id of the Hugging Face Hub (offline: one that was"
        )
        raise fault(f"cannot be loaded: {error}", local if os.path.isdir(place) else f"{hub} loaded before)") from None
    if tokenizer is None:
        problem, advice = "has no end-of-text token, which separates documents", "set eos_token in its"
        raise fault(problem, f"{advice} tokenizer_config.json, or name another tokenizer")
    if config.sha256 not in (None, tokenizer.config.sha256):
        problem = f"has the sha256 {tokenizer.config.sha256} where {config.sha256} was recorded"
        raise fault(problem, "use the tokenizer that it was recorded of")
    return tokenizer


class Unloadable(Exception):
    """A tokenizer that transformers cannot load, and why."""


@contextmanager
def _rust_errors(failure: Callable[[str], Exception]) -> Iterator[None]:
    """While entered, what goes wrong in the tokenizers library, whose panics are no Exception, raises `failure`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise failure(one_line(str(error) or type(error).__name__, 300)) from None


def _load(cls: Any, place: str) -> Any:
    """What AutoTokenizer makes of a folder or an id of the Hub, never running code of theirs. Unloadable if nothing."""

    def failure(told: str) -> Exception:
        if "trust_remote_code" in told:
            told = "it has code of its own (auto_map), which is never run"
        if "did not match any variant" in told or "Unknown tokenizer version" in told:
            told += f" (it is damaged, or of a later version than the installed tokenizers {version('tokenizers')})"
        return Unloadable(told)

    with _rust_errors(failure), opening(place):
        return cls.from_pretrained(place, trust_remote_code=False)


def _unfit(place: Path) -> tuple[str, str] | None:
    """What is wrong with a folder, without loading it, and what to do; None if nothing, or if there is no folder."""
    with suppress(OSError, ValueError):  # a name that is none of a file
        if not os.path.lexists(place):
            return None
        if not place.is_dir():
            return "is no folder", "name the folder that holds tokenizer.json"
        files = [path for path in map(place.joinpath, (*FILES, "config.json")) if os.path.lexists(path)]
        if not files:
            return "holds no tokenizer", "name a folder that save_pretrained of a tokenizer wrote"
        for path in files:
            if not (path.is_file() or path.is_dir()):
                return f"has {path.name}, which is no file", "mend the folder, or name another"
        if (place / FILES[0]).is_file():
            return _unfit_content(place / FILES[0])
    return None


def _unfit_content(path: Path) -> tuple[str, str] | None:
    """Whether a tokenizer.json is no JSON, or one with which the library takes all memory: for its size, for an id of
    its vocabulary, or because rules of it multiply the text.
    """
    if path.stat().st_size > LARGEST_FILE:
        return f"has {path.name} of {path.stat().st_size:,} bytes", "name a folder with a smaller vocabulary"
    advice = "mend the file, or name another tokenizer"
    try:
        whole = parse(path.read_bytes(), any_number=True)
    except ValueError as error:
        return f"has {path.name}, which {error}", advice
    for part in ("normalizer", "decoder"):
        if (growth := _growth(whole.get(part) if isinstance(whole, dict) else None)) > MOST_GROWTH:
            problem = f"has a {part} in {path.name} that makes up to {growth} characters of one"
            return f"{problem}, where at most {MOST_GROWTH} are allowed", advice
    try:
        ids = [number for number in whole["model"]["vocab"].values() if type(number) is int]
    except (LookupError, TypeError, AttributeError):  # which the library will say, or a list
        return None
    if max(ids, default=0) > LARGEST_ID:
        problem = f"has the token id {max(ids)} in {path.name}, where at most {LARGEST_ID} is allowed"
        return problem, advice
    return None


def _growth(rule: Any) -> int:
    """How many characters of text the rules of a normalizer or decoder make of one, at most; 1: they replace none."""
    if not isinstance(rule, dict):
        return 1
    pattern, content = rule.get("pattern"), rule.get("content")
    found = 1
    if isinstance(content, str) and isinstance(pattern, dict):
        replaced = pattern.get("String")  # a pattern may match a single character
        found = max(1, -(-len(content) // max(1, len(replaced) if isinstance(replaced, str) else 1)))
    rules = rule.get("normalizers") or rule.get("decoders")
    return found * math.prod(map(_growth, rules if isinstance(rules, list) else ()))


def _bytes_tokenizer() -> Any:
    """Byte-level BPE without merges: ids are the bytes of UTF-8, and 256 is the end of text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # how byte-level BPE writes each byte (GPT-2)

    backend = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in bytes_to_unicode().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    special = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def _plain_backend(hf: Any) -> Any:
    """A copy of the fast tokenizer's engine without truncation, padding and special tokens in texts."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(hf.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
