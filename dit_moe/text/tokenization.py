"""Text → token shards: stopped and continued at will, always the same bytes.

Documents are read as a stream and cut into shards by the number of their tokens, so that few documents are in memory at
a time. The main process does the work (the tokenizers library uses all cores); others wait.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from dit_moe import config as configs
from dit_moe.config import ConfigError, Tree, require, section
from dit_moe.distributed import from_main, join_processes, locked, on_main
from dit_moe.files import atomic_file, require_writable, write_atomically
from dit_moe.formatting import significant
from dit_moe.progress import work_bar
from dit_moe.shards import ShardFolder, in_rounds
from dit_moe.text.corpora import CORPORA, Corpus
from dit_moe.text.token_shards import (
    DTYPES,
    INDEX,
    TOKENIZER,
    TokenManifest,
    TokensConfig,
    TokenShard,
    TokenShards,
    folder_of,
    open_shards,
    require_whole,
)
from dit_moe.text.tokenizer import Document, TextTokenizer, TokenizerConfig, is_remote, open_tokenizer

RECORDED = ("corpus.fingerprint", "tokenizer.sha256")  # of what is in the encoding: not for users to set
BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 2**20  # that the tokenizer gets at a time
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Which text to tokenise, and by what. Where the tokens go is ``data.path`` and ``data.heldout``."""

    corpus: Annotated[Any, CORPORA]
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    shard_tokens: int = 2**27  # that close a shard, at the end of a document: what an interruption costs at most

    def __post_init__(self) -> None:
        require(self.shard_tokens >= 1, self, "shard_tokens", "must be at least 1")


class Tokenization:
    """Tokenises a split of a corpus into `folder`.

    Raises ConfigError if the corpus or the tokenizer cannot be opened, or if `folder` holds tokens of other text or by
    another tokenizer; ValueError if it holds files of the names to be written that no tokenisation wrote.
    """

    def __init__(self, config: TokenizeConfig, folder: Path, split: str) -> None:
        self.config, self.folder = config, folder
        self.files = ShardFolder(folder, {"split", "corpus", "tokenizer"})
        self.files.require_own(TOKENIZER)
        with section("tokenize.tokenizer"):
            self.tokenizer = open_tokenizer(config.tokenizer)
        with section("tokenize.corpus"):
            self.corpus: Corpus = CORPORA.build(config.corpus, split)
        self.dtype = "uint16" if self.tokenizer.vocab_size <= 2**16 else "uint32"
        self.made, self.text_bytes = 0, 0  # shards, and bytes of text read, by this call of `run`
        self.encoding = _describe(config, split, self.corpus.fingerprint, self.tokenizer.config)
        if (earlier := self.files.identity()) is not None:
            self._require_same(earlier)

    def _require_same(self, earlier: Tree) -> None:
        free = {
            "tokenizer.name",
            *(f"corpus.{option}" for option in self.corpus.unchecked_options),
        }  # hashes cover them
        if None in (self.corpus.fingerprint, earlier["corpus"]["fingerprint"]):  # of a stream, then or now
            free.add("corpus.fingerprint")
        where, otherwise = f"the tokens in {self.folder}", "tokenise into another folder, or delete that one"
        for remedy, also in (("take that value", RECORDED), ("restore the text and the tokenizer that it is of", ())):
            configs.require_same(self.encoding, earlier, "tokenize", where, f"{remedy}, {otherwise}", free.union(also))

    def run(self, on_bytes: Callable[[int], object] = lambda count: None) -> TokenManifest:
        """Make what is missing, then the manifest. `on_bytes(n)` for the text of every batch.

        The main process makes the shards one after the other, as each begins where the one before ended; the others
        wait. Raises ValueError if the corpus is empty, or something in it is not text.
        """
        main = join_processes().is_main_process
        self.files.begin(self.encoding)
        on_main(lambda: self.tokenizer.keep(self.folder / TOKENIZER, replace=True))
        records = in_rounds(self._records(on_bytes) if main else iter(()))
        return from_main(lambda: self._finish(records))

    def _finish(self, records: list[Tree]) -> TokenManifest:
        tokenizer = {
            "name": self.tokenizer.name,
            "sha256": self.tokenizer.config.sha256,
            "vocab_size": self.tokenizer.vocab_size,
            "eos": self.tokenizer.eos,
        }
        shards = tuple(TokenShard(**record["shard"]) for record in records)
        manifest = TokenManifest(tokenizer, self.dtype, self.encoding, shards)
        if not manifest.bytes:
            raise self._empty()
        manifest.write(self.folder)
        return manifest

    # ---------------------------------------------------------------------------------------------------------- shards

    def _records(self, on_bytes: Callable[[int], object]) -> Iterator[Tree]:
        """The record of each shard, which is made now if it is not there as it should be."""
        shard, first, last = 0, 0, False  # first: number of the document that the shard begins with
        documents: _Stream | None = None
        while not last:
            record = self._find(shard, first)
            if record is not None:
                documents = None
            else:
                documents = documents or _Stream(self._documents(first, on_bytes))
                record = self._make(shard, first, documents)
            yield record
            shard, first, last = shard + 1, first + record["shard"]["documents"], record["last"]

    def _find(self, shard: int, first: int) -> Tree | None:
        """The record of a shard that is there whole, and begins with document `first`."""
        record = self.files.record(shard)
        if record is None or record.get("first") != first:
            return None
        try:
            require_whole(self.folder, TokenShard(**record["shard"]), self.dtype)
        except (ValueError, TypeError, KeyError):
            return None
        return record

    def _make(self, shard: int, first: int, documents: _Stream) -> Tree:
        """Write documents until they have enough tokens, and keep a record."""
        path, dtype = self.files.path(shard, ".tokens"), DTYPES[self.dtype]
        index: list[tuple[int, int]] = []
        digest, tokens, largest = hashlib.sha256(), 0, 0
        with atomic_file(path) as file:
            for document in documents:
                ids = np.concatenate([[self.tokenizer.eos], document.ids], dtype=dtype, casting="unsafe")
                content = ids.tobytes()
                digest.update(content)
                file.write(content)
                index.append((tokens, document.bytes))
                tokens += len(ids)
                largest = max(largest, int(ids.max()))
                if tokens >= self.config.shard_tokens:
                    break
            if not index:
                raise self._empty()
        starts = np.array(index, dtype=INDEX)
        write_atomically(self.files.path(shard, ".documents"), starts.tobytes())
        made = TokenShard(
            file=path.stem,
            documents=len(index),
            tokens=tokens,
            bytes=int(starts[:, 1].sum()),
            largest=largest,
            sha256=digest.hexdigest(),
            documents_sha256=hashlib.sha256(starts.tobytes()).hexdigest(),
        )
        record = {"shard": asdict(made), "first": first, "last": documents.ended}
        self.files.write_record(shard, record)
        self.made += 1
        return record

    def _empty(self) -> ValueError:
        return ValueError(f"tokenize.corpus is empty: the split {self.corpus.split} has no text; name some that has")

    # ------------------------------------------------------------------------------------------------------- documents

    def _documents(self, first: int, on_bytes: Callable[[int], object]) -> Iterator[Document]:
        """The tokenised documents from number `first` on."""
        number, eos = first, self.tokenizer.eos
        for texts, encoded in _encoded_ahead(self.tokenizer, _batches(self.corpus.documents(first))):
            sizes = [len(text.encode()) for text in texts]
            for ids, size in zip(encoded, sizes, strict=True):
                if (ids == eos).any():
                    problem = f"document {number} of the split {self.corpus.split} spells the end of text"
                    remedy = "take the spelling out of the text, or name another tokenizer"
                    raise ValueError(f"{problem}, which {self.tokenizer.name} cannot encode as plain text; {remedy}")
                number += 1
                yield Document(ids, size)
            self.text_bytes += sum(sizes)
            on_bytes(sum(sizes))


class _Stream:
    """Documents one by one, and whether there are more."""

    def __init__(self, documents: Iterator[Document]) -> None:
        self._documents = documents
        self._next = next(documents, None)

    @property
    def ended(self) -> bool:
        return self._next is None

    def __iter__(self) -> Iterator[Document]:
        while self._next is not None:
            document, self._next = self._next, next(self._documents, None)
            yield document


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Enough texts at a time to keep all cores busy, and few enough to need little memory."""
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded_ahead(
    tokenizer: TextTokenizer, batches: Iterator[list[str]]
) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    """Batches with their ids; the next is encoded, outside Python's lock, while one is written."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for texts in batches:
            coming = texts, pool.submit(tokenizer.encode_batch, texts)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = coming
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def finished(config: TokenizeConfig, folder: Path, split: str) -> TokenManifest | None:
    """The manifest of `folder` if it is whole and was made as `config` says.

    Nothing is changed. Text and tokenizer are compared too if they lie on this machine; the network is not asked.
    Raises ConfigError if such text or tokenizer cannot be opened.
    """
    try:
        tokens = TokenShards(folder)
        tokens.tokenizer()
    except ValueError:  # to be made, or made anew
        return None
    encoding = tokens.manifest.encoding
    fingerprint, tokenizer = encoding["corpus"]["fingerprint"], config.tokenizer
    tokenizer = replace(tokenizer, sha256=tokenizer.sha256 or encoding["tokenizer"]["sha256"])
    if _describe(config, split, fingerprint, tokenizer) != encoding:
        return None
    if not is_remote(config.tokenizer):
        with section("tokenize.tokenizer"):
            tokenizer = open_tokenizer(config.tokenizer).config
    if not CORPORA.factory(config.corpus).is_remote(config.corpus):
        with section("tokenize.corpus"):
            fingerprint = CORPORA.build(config.corpus, split).fingerprint
    return tokens.manifest if _describe(config, split, fingerprint, tokenizer) == encoding else None


def _describe(config: TokenizeConfig, split: str, fingerprint: str | None, tokenizer: TokenizerConfig) -> Tree:
    """What decides the bytes of the tokens."""
    corpus = {"name": CORPORA.name_of(config.corpus), **configs.dump(config.corpus)}
    return {
        "split": split,
        "corpus": corpus | {"fingerprint": fingerprint},
        "tokenizer": configs.dump(tokenizer),
        "shard_tokens": config.shard_tokens,
    }


# ----------------------------------------------------------------------------------------------- the splits of a config


def tokenize_splits(
    config: TokenizeConfig | None, data: TokensConfig, split: str | None = None
) -> dict[str, dict[str, Any]]:
    """Make what is missing of the tokens of all splits, or of one; returns a summary of each.

    Raises what `Tokenization` and its `run` raise; ConfigError if the section `tokenize` is missing.
    """
    return {name: _tokenize_split(config, data, name) for name in _chosen(data, split)}


def verify_splits(data: TokensConfig, split: str | None = None) -> dict[str, dict[str, Any]]:
    """Verify the tokens of all splits, or of one; returns a summary of each.

    ValueError if anything is not as it was written.
    """
    return {name: _verify_split(data, name) for name in _chosen(data, split)}


def _chosen(data: TokensConfig, split: str | None) -> list[str]:
    if split is not None:
        return [split]
    return ["train"] if data.heldout is None else ["train", "heldout"]


def _tokenize_split(config: TokenizeConfig | None, data: TokensConfig, split: str) -> dict[str, Any]:
    if config is None:
        raise ConfigError("tokenize", " is missing; say which text, for instance tokenize.corpus.name=python_docs")
    with section("data"):
        folder = folder_of(data, split)
    manifest = from_main(lambda: finished(config, folder, split))
    if manifest is not None:
        return _summary(folder, manifest) | {"shards_made": 0, "already_there": True}
    require_writable(folder)
    with locked(folder):
        task, start = Tokenization(config, folder, split), time.perf_counter()
        size = task.corpus.size
        with work_bar(f"tokenising {split}", None if size is None else size / MB, "MB") as advance:
            manifest = task.run(lambda text_bytes: advance(text_bytes / MB))
    seconds = time.perf_counter() - start
    return _summary(folder, manifest) | {
        "shards_made": task.made,
        "seconds": round(seconds, 3),
        "mb_per_s": significant(task.text_bytes / MB / seconds),
    }


def _verify_split(data: TokensConfig, split: str) -> dict[str, Any]:
    with section("data"):
        tokens = open_shards(data, split)
    with work_bar(f"verifying {split}", tokens.manifest.bytes / MB, "MB") as advance:
        tokens.verify(lambda count: advance(count / MB))
    return _summary(tokens.folder, tokens.manifest) | {"verified": True}


def _summary(folder: Path, manifest: TokenManifest) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "tokens": manifest.tokens,
        "documents": manifest.documents,
        "bytes": manifest.bytes,
        "shards": len(manifest.shards),
        "tokenizer": manifest.tokenizer,
        "description": manifest.describe(),
        "fingerprint": manifest.fingerprint,
    }
