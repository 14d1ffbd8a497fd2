"""Text → token shards: stopped and continued at will, always the same bytes.

Documents are read as a stream and cut into shards by the number of their tokens, so no more than some documents are in
memory at a time. What is done is what has a record; the manifest is made of the records. The main process does the work
(the tokenizers library uses all cores); others wait.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple

import numpy as np

from dit_moe import config as configs
from dit_moe.config import Tree, require, section
from dit_moe.distributed import join_processes, on_all, on_main
from dit_moe.files import atomic_file, read_object, require_own, write_atomically
from dit_moe.text.corpora import CORPORA, Corpus
from dit_moe.text.token_shards import (
    DTYPES,
    INDEX,
    MANIFEST,
    SHARDS,
    TOKENIZER,
    TokenManifest,
    TokenShard,
    TokenShards,
    documents_file,
    require_whole,
    tokens_file,
    write_token_manifest,
)
from dit_moe.text.tokenizer import TextTokenizer, TokenizerConfig, is_remote, open_tokenizer

ENCODING = "encoding.json"
OWN = {"split", "corpus", "tokenizer"}  # keys of it by which it is told from others of that name
RECORDED = ("corpus.fingerprint", "tokenizer.sha256")  # of what is in the encoding: not for users to set
BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 2**20  # that the tokenizer gets at a time


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Which text to tokenise, and by what. Where the tokens go is ``data.path`` and ``data.heldout``."""

    corpus: Annotated[Any, CORPORA]
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    shard_tokens: int = 2**27  # that close a shard, at the end of a document: what an interruption costs at most

    def __post_init__(self) -> None:
        require(self.shard_tokens >= 1, self, "shard_tokens", "must be at least 1")


class Document(NamedTuple):
    """The end of text and the tokens of a document, and how many bytes its text has."""

    ids: np.ndarray
    bytes: int


class Tokenization:
    """Tokenises a split of a corpus into `folder`.

    Raises ConfigError: the corpus or the tokenizer cannot be had, or `folder` holds tokens of other text, or by another
    tokenizer. ValueError: it holds files of the names that are to be written which no tokenisation wrote.
    """

    def __init__(self, config: TokenizeConfig, folder: Path, split: str) -> None:
        self.config, self.folder = config, folder
        require_own(folder, (MANIFEST, ENCODING, SHARDS, TOKENIZER), _is_own(folder))
        with section("tokenize.tokenizer"):
            self.tokenizer = open_tokenizer(config.tokenizer)
        with section("tokenize.corpus"):
            self.corpus: Corpus = CORPORA.build(config.corpus, split)
        self.dtype = "uint16" if self.tokenizer.vocab_size <= 2**16 else "uint32"
        self.made = 0  # shards, by this call of `run`
        self.encoding = _describe(config, split, self.corpus.fingerprint, self.tokenizer.config)
        if self._has_records():  # before the first shard all may change
            self._require_same(json.loads((folder / ENCODING).read_text()))

    def _require_same(self, earlier: Tree) -> None:
        free = {"tokenizer.name", *(f"corpus.{option}" for option in self.corpus.free)}  # hashes stand for them
        if None in (self.corpus.fingerprint, earlier["corpus"]["fingerprint"]):  # of a stream, then or now
            free.add("corpus.fingerprint")
        where, otherwise = f"the tokens in {self.folder}", "tokenise into another folder, or delete that one"
        for remedy, also in (("take that value", RECORDED), ("restore the text and the tokenizer that it is of", ())):
            configs.require_same(self.encoding, earlier, "tokenize", where, f"{remedy}, {otherwise}", free.union(also))

    def _has_records(self) -> bool:
        return (self.folder / ENCODING).is_file() and any((self.folder / SHARDS).glob("*.json"))

    def run(self, on_bytes: Callable[[int], object] = lambda count: None) -> TokenManifest:
        """Make what is missing, then the manifest. `on_bytes(n)` for the text of every batch.

        Raises ValueError if the corpus is empty, or something in it is no text.
        """
        main = join_processes().is_main_process
        on_main(self._begin)
        records: list[Tree] = []
        shards = self._complete(records, on_bytes)
        # Together, so that no one waits long for another.
        while on_all(lambda: main and next(shards, None) is not None)[0]:
            pass
        return on_all(lambda: self._finish(records) if main else None)[0]  # type: ignore[return-value]

    def _begin(self) -> None:
        (self.folder / SHARDS).mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / ENCODING, json.dumps(self.encoding, indent=1) + "\n")
        self.tokenizer.keep(self.folder / TOKENIZER, replace=True)

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
        write_token_manifest(self.folder, manifest)
        return manifest

    # ---------------------------------------------------------------------------------------------------------- shards

    def _complete(self, records: list[Tree], on_bytes: Callable[[int], object]) -> Iterator[Tree]:
        """Append the record of each shard, made now if it is not there as it should be."""
        first, stream = 0, None  # document
        while not (records and records[-1]["last"]):
            record = self._record(len(records), first)
            if record is not None:
                stream = None
            else:
                stream = stream or _Stream(self._documents(first, on_bytes))
                record = self._make(len(records), first, stream)
            first += record["shard"]["documents"]
            records.append(record)
            yield record

    def _record(self, number: int, first: int) -> Tree | None:
        """Of a shard that is there whole, and begins with document `first`."""
        path = self._path(number)
        try:
            record = json.loads(path.read_text())
            require_whole(self.folder, TokenShard(**record["shard"]), self.dtype)
        except (ValueError, TypeError, KeyError, FileNotFoundError):
            return None
        return record if record["first"] == first else None

    def _make(self, number: int, first: int, stream: _Stream) -> Tree:
        """Write documents of the stream until they are tokens enough, and keep a record."""
        path = self._path(number)
        shard = TokenShard(path.stem, 0, 0, 0, 0, "", "")
        index: list[tuple[int, int]] = []
        tokens, text_bytes, largest = 0, 0, 0
        with atomic_file(tokens_file(self.folder, shard)) as file:
            hashed = _Hashed(file)
            for document in stream:
                index.append((tokens, document.bytes))
                hashed.write(document.ids.tobytes())
                tokens += len(document.ids)
                text_bytes += document.bytes
                largest = max(largest, int(document.ids.max()))
                if tokens >= self.config.shard_tokens:
                    break
            if not index:
                raise self._empty()
        documents = np.array(index, dtype=INDEX).tobytes()
        write_atomically(documents_file(self.folder, shard), documents)
        sha256, documents_sha256 = hashed.digest.hexdigest(), hashlib.sha256(documents).hexdigest()
        shard = TokenShard(path.stem, len(index), tokens, text_bytes, largest, sha256, documents_sha256)
        record = {"shard": asdict(shard), "first": first, "last": stream.ended}
        write_atomically(path, json.dumps(record) + "\n")
        self.made += 1
        return record

    def _empty(self) -> ValueError:
        return ValueError(f"tokenize.corpus is empty: the split {self.corpus.split} has no text; name some that has")

    def _path(self, number: int) -> Path:
        return self.folder / SHARDS / f"{number:05d}.json"

    # ------------------------------------------------------------------------------------------------------- documents

    def _documents(self, first: int, on_bytes: Callable[[int], object]) -> Iterator[Document]:
        """The tokenised documents from number `first` on."""
        number, dtype, eos = first, DTYPES[self.dtype], self.tokenizer.eos
        for texts, encoded in _ahead(self.tokenizer, _batches(self.corpus.documents(first))):
            batch_bytes = 0
            for text, plain in zip(texts, encoded, strict=True):
                ids = np.empty(len(plain) + 1, dtype=dtype)
                ids[0], ids[1:] = eos, plain
                if (ids[1:] == eos).any():
                    problem = f"document {number} of the split {self.corpus.split} spells the end of text"
                    remedy = "take the spelling out of the text, or name another tokenizer"
                    raise ValueError(f"{problem}, which {self.tokenizer.name} cannot encode as plain text; {remedy}")
                size = len(text.encode())
                batch_bytes += size
                number += 1
                yield Document(ids, size)
            on_bytes(batch_bytes)


def tokenize(
    config: TokenizeConfig, folder: Path, split: str, on_bytes: Callable[[int], object] = lambda count: None
) -> TokenManifest:
    """Make what is missing of the tokens of a split in `folder`. Raises what `Tokenization` and its `run` raise."""
    return finished(config, folder, split) or Tokenization(config, folder, split).run(on_bytes)


def finished(config: TokenizeConfig, folder: Path, split: str) -> TokenManifest | None:
    """The manifest of `folder` if it is whole, and was made of what `config` says; all processes ask together.

    It is only looked at. Text and tokenizer are compared too if they lie on this machine; the network is not asked.
    Raises ConfigError if such text or tokenizer cannot be had.
    """
    main = join_processes().is_main_process
    return on_all(lambda: _finished(config, folder, split) if main else None)[0]


def _finished(config: TokenizeConfig, folder: Path, split: str) -> TokenManifest | None:
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


def _is_own(folder: Path) -> bool:
    """Whether a tokenisation was begun in `folder`, of which its encoding.json is the first file, or finished."""
    begun, finished = read_object(folder / ENCODING), read_object(folder / MANIFEST).get("encoding")
    return any(isinstance(each, dict) and each.keys() >= OWN for each in (begun, finished))


def _describe(config: TokenizeConfig, split: str, fingerprint: str | None, tokenizer: TokenizerConfig) -> Tree:
    """What decides the bytes of the tokens."""
    corpus = {"name": CORPORA.name_of(config.corpus), **configs.dump(config.corpus)}
    return {
        "split": split,
        "corpus": corpus | {"fingerprint": fingerprint},
        "tokenizer": configs.dump(tokenizer),
        "shard_tokens": config.shard_tokens,
    }


class _Stream:
    """Documents one by one, knowing whether that was the last."""

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


class _Hashed:
    """A file that is hashed while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content: bytes) -> None:
        self.digest.update(content)
        self.file.write(content)


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """As many at a time as keep all cores busy, and little memory."""
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


def _ahead(tokenizer: TextTokenizer, batches: Iterator[list[str]]) -> Iterator[tuple[list[str], list[np.ndarray]]]:
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
