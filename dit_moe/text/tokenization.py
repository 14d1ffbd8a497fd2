"""Text → token shards: stopped and continued at will, always the same bytes.

Documents are read as a stream and cut into shards by the number of their tokens, so that few documents are in memory at
a time. The main process does the work (the tokenizers library uses all cores); others wait.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from dit_moe import config as configs
from dit_moe.config import Tree, WorkFailed, require, section
from dit_moe.distributed import from_main, join_processes, on_main
from dit_moe.files import atomic_file, write_atomically
from dit_moe.shards import ShardFolder, in_rounds
from dit_moe.text.corpora import CORPORA, Corpus, Row
from dit_moe.text.losses import NO_LOSSES, TextLosses, losses_of
from dit_moe.text.token_shards import (
    DTYPES,
    INDEX,
    TOKENIZER,
    TokenEncoding,
    TokenManifest,
    TokenRecord,
    TokenShard,
    TokenShards,
    require_whole,
)
from dit_moe.text.tokenizer import Document, TextTokenizer, TokenizerConfig, is_remote, open_tokenizer

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


class Tokenization:
    """Tokenises a split of a corpus into `folder`.

    Raises ConfigError if the corpus or the tokenizer cannot be opened, or if `folder` holds tokens of other text or by
    another tokenizer; ValueError if it holds files of the names to be written that no tokenisation wrote.
    """

    def __init__(self, config: TokenizeConfig, folder: Path, split: str) -> None:
        self.config, self.folder = config, folder
        self.files = ShardFolder(folder, TokenEncoding, TokenRecord)
        self.files.require_own(TOKENIZER)
        with section("tokenize.tokenizer"):
            self.tokenizer = open_tokenizer(config.tokenizer)
        with section("tokenize.corpus"):
            self.corpus: Corpus = CORPORA.build(config.corpus, split)
        self.dtype = "uint16" if self.tokenizer.vocab_size <= 2**16 else "uint32"
        self.made, self.text_bytes = 0, 0  # shards, and bytes of text read, by this call of `run`
        self._ahead: _Stream | None = None  # the documents, of which some are tokenised before anything is written
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
        wait. Raises ValueError, before anything is written, if the corpus is empty, or something at its beginning is
        not text; WorkFailed if that is found later.
        """
        main, self._on_bytes = join_processes().is_main_process, on_bytes
        on_main(self.look_ahead)
        self.files.begin(self.encoding)
        on_main(lambda: self.tokenizer.keep(self.folder / TOKENIZER, replace=True))
        try:
            records = in_rounds(self._records() if main else iter(()))
        except ValueError as error:
            raise WorkFailed(f"{error}; then delete {self.folder}, for its tokens are of the text as it was") from None
        return from_main(lambda: self._finish(records))

    def _finish(self, records: list[Tree]) -> TokenManifest:
        tokenizer = {
            "name": self.tokenizer.name,
            "sha256": self.tokenizer.config.sha256,
            "vocab_size": self.tokenizer.vocab_size,
            "eos": self.tokenizer.eos,
        }
        shards = tuple(TokenShard(**record["shard"]) for record in records)
        losses = [_losses_of(record) for record in records]
        known = None if None in losses else sum(filter(None, losses), NO_LOSSES)
        passed_over = getattr(self.corpus, "passed_over", {})
        manifest = TokenManifest(tokenizer, self.dtype, self.encoding, shards, known, passed_over)
        if not manifest.bytes:
            raise self._empty(known or NO_LOSSES)
        manifest.write(self.folder)
        return manifest

    def look_ahead(self) -> None:
        """Refuse an empty corpus, and what cannot be tokenised at its beginning, unless there are shards already."""
        if self.files.identity() is not None:
            return
        if not any(self.corpus.documents()):
            raise self._empty(sum((TextLosses(without_text=row.text is None) for row in self.corpus.rows()), NO_LOSSES))
        self._ahead = _Stream(self._documents(0))

    # ---------------------------------------------------------------------------------------------------------- shards

    def _records(self) -> Iterator[Tree]:
        """The record of each shard, which is made now if it is not there as it should be."""
        shard, first, last = 0, 0, False  # first: number of the document that the shard begins with
        documents, self._ahead = self._ahead, None
        while not last:
            record = self._find(shard, first)
            if record is not None:
                documents = None
            else:
                documents = documents or _Stream(self._documents(first))
                record = self._make(shard, first, documents)
            yield record
            shard, first, last = shard + 1, first + record["shard"]["documents"], record["last"]

    def _find(self, shard: int, first: int) -> Tree | None:
        """The record of a shard that is there whole, and begins with document `first`."""
        record = self.files.record(shard)
        if record is None or (record["first"], record["shard"]["file"]) != (first, f"{shard:05d}"):
            return None
        try:
            require_whole(self.folder, TokenShard(**record["shard"]), self.dtype)
        except ValueError:
            return None
        return record

    def _make(self, shard: int, first: int, documents: _Stream) -> Tree:
        """Write documents until they have enough tokens, and keep a record."""
        path, dtype = self.files.path(shard, ".tokens"), DTYPES[self.dtype]
        index: list[tuple[int, int]] = []
        digest, tokens, largest, losses = hashlib.sha256(), 0, 0, NO_LOSSES
        with atomic_file(path) as file:
            for document, own in documents:
                losses = losses + own if own is not NO_LOSSES else losses
                ids = np.concatenate([[self.tokenizer.eos], document.ids], dtype=dtype, casting="unsafe")
                content = ids.tobytes()
                digest.update(content)
                file.write(content)
                index.append((tokens, document.bytes))
                tokens += len(ids)
                largest = max(largest, int(ids.max()))
                if tokens >= self.config.shard_tokens:
                    break
            losses = losses + documents.behind if documents.ended else losses
            if not index:
                raise self._empty(losses)
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
        record = {"shard": asdict(made), "first": first, "last": documents.ended, "losses": losses.dump()}
        self.files.write_record(shard, record)
        self.made += 1
        return record

    def _empty(self, losses: TextLosses) -> ValueError:
        left_out = f" ({found} were left out)" if (found := losses.describe_left_out()) else ""
        problem = f"tokenize.corpus is empty: the split {self.corpus.split} has no text{left_out}"
        return ValueError(f"{problem}; name some that has")

    # ------------------------------------------------------------------------------------------------------- documents

    def _documents(self, first: int) -> Iterator[_Tokenized]:
        """The tokenised documents from number `first` on, and what is left out between them."""
        number = first
        for rows, encoded in _encoded_ahead(self.tokenizer, _batches(self.corpus.rows(first))):
            texts = [row.text for row in rows if row.text is not None]
            for i, ids in enumerate(encoded):
                self._require_plain(number + i, ids)
            sizes = [len(text.encode()) for text in texts]
            documents = map(Document, encoded, sizes)
            losses = iter(losses_of(self.tokenizer, texts, encoded, number))
            for row in rows:
                own = next(losses) if row.text is not None else TextLosses(without_text=1)
                own = own + TextLosses(byte_order_marks=1) if row.marked else own
                yield _Tokenized(next(documents) if row.text is not None else None, own)
            number += len(texts)
            self.text_bytes += sum(sizes)
            self._on_bytes(sum(sizes))

    def _require_plain(self, number: int, ids: np.ndarray) -> None:
        """ValueError if a document's ids cannot be stored."""
        where, name = f"document {number} of the split {self.corpus.split}", self.tokenizer.name
        if (ids == self.tokenizer.eos).any():
            problem = f"{where} spells the end of text, which {name} cannot encode as plain text"
            if self.tokenizer.eos == self.tokenizer.unknown:
                problem = f"{where} has text for which {name} has no token but the end of text"
            raise ValueError(f"{problem}; take the spelling out of the text, or name another tokenizer")
        if len(ids) and int(ids.max()) >= self.tokenizer.vocab_size:
            problem = f"{where} has the token id {ids.max()}, beyond the vocabulary of {name}"
            raise ValueError(f"{problem}; mend its tokenizer.json, or name another tokenizer")


def _losses_of(record: Tree) -> TextLosses | None:
    """What was lost of a shard's text; None if an earlier version did not count it."""
    return None if record.get("losses") is None else configs.build(TextLosses, record["losses"])


class _Tokenized(NamedTuple):
    """A tokenised document, or None for one that is left out, and what of it is lost."""

    document: Document | None
    losses: TextLosses


class _Stream:
    """Documents one by one, what was lost of each and left out before it, and whether there are more."""

    def __init__(self, rows: Iterator[_Tokenized]) -> None:
        self._rows = rows
        self._advance()

    def _advance(self) -> None:
        self._next, self.behind = None, NO_LOSSES  # what is left out behind the last document
        for document, losses in self._rows:
            self.behind = losses if self.behind is NO_LOSSES else self.behind + losses
            if document is not None:
                self._next = document
                return

    @property
    def ended(self) -> bool:
        return self._next is None

    def __iter__(self) -> Iterator[tuple[Document, TextLosses]]:
        while self._next is not None:
            found = self._next, self.behind
            self._advance()
            yield found


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Enough texts at a time to keep all cores busy, and few enough to need little memory."""
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row.text or "")
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded_ahead(
    tokenizer: TextTokenizer, batches: Iterator[list[Row]]
) -> Iterator[tuple[list[Row], list[np.ndarray]]]:
    """Batches with the ids of their texts; the next is encoded, outside Python's lock, while one is written."""
    pool = ThreadPoolExecutor(1)
    try:
        waiting = None
        for rows in batches:
            coming = rows, pool.submit(tokenizer.encode_batch, [row.text for row in rows if row.text is not None])
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = coming
        if waiting is not None:
            yield waiting[0], waiting[1].result()
    finally:  # an abandoned one is closed by the garbage collector, maybe while a thread starts: waiting would hang
        pool.shutdown(wait=False, cancel_futures=True)


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
    if not corpus.get("skip_null"):  # as in folders that were written before there was this option
        corpus.pop("skip_null", None)
    return {
        "split": split,
        "corpus": corpus | {"fingerprint": fingerprint},
        "tokenizer": configs.dump(tokenizer),
        "shard_tokens": config.shard_tokens,
    }
