"""Folders of token shards: the format, and reading them by memory map.

    data/openwebtext/
        manifest.json              written last: a folder without it holds no finished tokens; its last entry is the
                                   hash of its text without that entry
        encoding.json              of what, and how; an interrupted tokenisation goes on only with the same
        tokenizer/                 what `transformers.AutoTokenizer` loads
        shards/00000.tokens …      ids, little-endian, of 2 bytes if the vocabulary allows, else of 4
        shards/00000.documents …   int64 [n, 2]: where in the shard a document starts, and how many bytes its text has
        shards/00000.json …        written after its shard: sizes and hashes of it

A document is stored as the end of text, then its tokens: that id ends the document before, and is the first context of
its own. It occurs nowhere else.
"""

# n documents of a shard

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np

from dit_moe.config import ConfigError, Keys, Matching, Tree, require
from dit_moe.files import require_size, sha256_of
from dit_moe.json_files import Count, FileName, Name, Sha256, Size, read_sealed, write_sealed
from dit_moe.text.losses import TextLosses
from dit_moe.text.tokenizer import Document, TextTokenizer, TokenizerConfig, open_tokenizer

FORMAT = 1
MANIFEST, SHARDS, TOKENIZER = "manifest.json", "shards", "tokenizer"
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
INDEX = np.dtype("<i8")  # of documents
REMEDY = "run `dit-moe tokenize` again, which makes it anew"
CHECKED_DOCUMENTS = 64  # of a shard, whose beginnings tell its tokens from those of another
MOST_COMPARED = 50_000  # documents of a split, to find repeated ones
MAX_MAPPED_FILES = 512  # each holds a descriptor, of which a process often may have 1024


class NoTokens(ValueError):
    """There are no finished tokens in the folder."""


@dataclass(frozen=True)
class TokenShard:
    """Two files: its tokens, and where its documents begin."""

    file: FileName  # without suffix
    documents: Size
    tokens: Size
    bytes: Count  # of the documents' text in UTF-8
    largest: Count  # id
    sha256: Sha256  # of the tokens
    documents_sha256: Sha256


class TokenRecord(TypedDict):
    """Of a shard: its entry in the manifest, the number of its first document, and whether it is the last."""

    shard: Annotated[Tree, Keys(TokenShard)]
    first: Count
    last: bool
    losses: NotRequired[Annotated[Tree, Keys(TextLosses)] | None]


class TokenizerFacts(TypedDict):
    """The tokenizer of some tokens."""

    name: Name
    sha256: str
    vocab_size: Size
    eos: Count  # id


class CorpusFacts(TypedDict):
    """The corpus of some tokens: the fields that all have of its section, and what tells its content."""

    name: Name
    fingerprint: str | None


class TokenEncoding(TypedDict):
    """Of what text the tokens are, and how they are made: the fields that are read without the config."""

    corpus: CorpusFacts
    tokenizer: Tree
    split: str


class Origin(TypedDict):
    """What a model keeps of the tokens that it was trained on."""

    encoding: TokenEncoding
    fingerprint: str


@dataclass(frozen=True)
class TokenManifest:
    """All facts about tokenised text. `read_token_manifest` reads one and checks that its shards are there."""

    tokenizer: Annotated[Tree, Keys(TokenizerFacts)]
    dtype: Annotated[str, Matching("|".join(DTYPES), "uint16 or uint32")]
    encoding: Annotated[Tree, Keys(TokenEncoding)]  # what an interrupted tokenisation must find again
    shards: tuple[TokenShard, ...]
    losses: TextLosses | None = None  # None: an earlier version did not count them
    passed_over: Tree = field(default_factory=dict)  # of files beside those that were read: `dit_moe.data.listing`

    def __post_init__(self) -> None:
        twice = len({shard.file for shard in self.shards}) < len(self.shards)
        require(not twice and self.tokens > 0, self, "shards", "must name each file once, and have at least one")

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Of text."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def largest(self) -> int:
        """The largest id."""
        return max(shard.largest for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """The same for the same documents by the same tokenizer, wherever they lie."""
        hashes = [(shard.sha256, shard.documents_sha256) for shard in self.shards]
        return hashlib.sha256(json.dumps([self.tokenizer["sha256"], hashes]).encode()).hexdigest()

    @property
    def origin(self) -> Tree:
        """What a model that was trained on the tokens keeps for `require_held_out`; JSON-ready."""
        return {"encoding": self.encoding, "fingerprint": self.fingerprint}

    def describe(self) -> str:
        """The tokens in a few words."""
        ratio = f"{self.bytes / self.tokens:.2f} bytes a token"
        return f"{self.tokens:,} tokens of {self.documents:,} documents by {self.tokenizer['name']}, {ratio}"

    def write(self, folder: Path) -> None:
        """Put the manifest in place, sealed by a hash of its text."""
        totals = {name: getattr(self, name) for name in ("tokens", "documents", "bytes", "largest", "fingerprint")}
        write_sealed(folder / MANIFEST, {"format": FORMAT, **asdict(self), **totals})


def require_held_out(trained: Tree, heldout: TokenManifest) -> None:
    """ConfigError if text of `heldout`, the folder that data.heldout names, is known to be trained on.

    `trained` is the `origin` of the tokens that were.
    """
    if trained["fingerprint"] == heldout.fingerprint:
        raise ConfigError("data.heldout", " is the same text as data.path; name held-out text")
    one, other = trained["encoding"], heldout.encoding
    every, of_other = (encoding["corpus"].get("heldout_every") for encoding in (one, other))
    contents = one["corpus"]["fingerprint"], other["corpus"]["fingerprint"]
    place, other_place = _place(one), _place(other)
    same_place = place[-1] is not None and place == other_place
    # Names and sizes identify a source only if both splits were cut out of it.
    numbered = every is not None and of_other is not None
    if not (same_place or (numbered and contents[0] is not None and contents[0] == contents[1])):
        return
    # Every 10th document is also a 5th, and `first` changes neither; one more document changes all numbers.
    unchanged = None in contents or contents[0] == contents[1]
    apart = (one["split"], other["split"]) == ("train", "heldout") and numbered and of_other % every == 0
    if not (apart and unchanged):
        problem = " has documents that are trained on: those were the train split of the same source with"
        found = f"heldout_every={every}, these are its split {other['split']} with heldout_every={of_other}"
        also = "" if unchanged else ", and the source has changed in between"
        raise ConfigError("data.heldout", f"{problem} {found}{also}; tokenise both anew with one config")


def _place(encoding: Tree) -> tuple[str | None, ...]:
    """Where the documents of an encoding were read from."""
    corpus = encoding["corpus"]
    own = encoding["split"] == "heldout" and not corpus.get("heldout_every")
    place = corpus.get("heldout") if own else corpus.get("path", corpus.get("train"))
    return corpus["name"], corpus.get("id"), corpus.get("subset"), place


def read_token_manifest(folder: str | Path, option: str = "data.path") -> TokenManifest:
    """The manifest of a folder, which `option` names; its shards are all there at their right sizes.

    Raises:
        NoTokens: there is none, or the tokenisation was not finished.
        ValueError: it was changed, is of another format, or a shard is missing or truncated.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        found = "holds an unfinished tokenisation" if (folder / SHARDS).is_dir() else "holds no tokens"
        raise NoTokens(f"{folder} {found}; run `dit-moe tokenize CONFIG`, or name another folder in {option}")
    remedy = "name a folder that `dit-moe tokenize` wrote, or delete it and run that again"
    manifest = read_sealed(folder / MANIFEST, TokenManifest, FORMAT, remedy)
    for shard in manifest.shards:
        require_whole(folder, shard, manifest.dtype)
    return manifest


def require_whole(folder: Path, shard: TokenShard, dtype: str) -> None:
    """ValueError unless a shard's files are there at their right sizes."""
    tokens, documents = _files(folder, shard)
    require_size(tokens, shard.tokens * DTYPES[dtype].itemsize, MANIFEST, REMEDY)
    require_size(documents, shard.documents * 2 * INDEX.itemsize, MANIFEST, REMEDY)


def _files(folder: Path, shard: TokenShard) -> tuple[Path, Path]:
    return folder / SHARDS / f"{shard.file}.tokens", folder / SHARDS / f"{shard.file}.documents"


class TokenShards:
    """All tokens of a folder, one behind the other, and the documents they make up.

    Raises what `read_token_manifest` raises.
    """

    def __init__(self, folder: str | Path, option: str = "data.path") -> None:
        self.folder = Path(folder)
        self.manifest = read_token_manifest(folder, option)
        self._starts = np.cumsum([0, *(shard.tokens for shard in self.manifest.shards)])
        self._first = np.cumsum([0, *(shard.documents for shard in self.manifest.shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def eos(self) -> int:
        """The id that stands before every document."""
        return self.manifest.tokenizer["eos"]

    def tokenizer(self) -> TextTokenizer:
        """The tokenizer that was kept with the tokens; ValueError if it is not there as it was."""
        recorded = TokenizerConfig(name=self.manifest.tokenizer["name"], sha256=self.manifest.tokenizer["sha256"])
        return open_tokenizer(recorded, self.folder / TOKENIZER, f"restore it from a copy, or {REMEDY}")

    def read(self, start: int, into: np.ndarray) -> None:
        """Fill an array with the tokens from `start` on, across shards if need be."""
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = 0
        while done < len(into):
            tokens = self._tokens(number)
            offset = start + done - int(self._starts[number])
            part = tokens[offset : offset + len(into) - done]
            into[done : done + len(part)] = part
            done, number = done + len(part), number + 1

    def documents(self, start: int = 0, stop: int | None = None, step: int = 1) -> Iterator[Document]:
        """The documents, or every `step`-th of them."""
        for document in range(self.manifest.documents)[start:stop:step]:
            number = int(np.searchsorted(self._first, document, side="right")) - 1
            index, place = self._index(number), document - int(self._first[number])
            end = int(index[place + 1, 0]) if place + 1 < len(index) else None
            ids = self._tokens(number)[int(index[place, 0]) + 1 : end].tolist()
            yield Document(ids, int(index[place, 1]))

    def sizes(self) -> np.ndarray:
        """Tokens and bytes of every document, in one number of each that tells most documents apart, int64 [n]."""
        found = []
        for number, shard in enumerate(self.manifest.shards):
            starts_n, bytes_n = self._index(number).T
            found.append((np.diff(starts_n, append=shard.tokens) << 32) + bytes_n)
        return np.concatenate(found)

    def verify(self, on_bytes: Callable[[int], object] = lambda count: None) -> None:
        """Read everything. ValueError if a file was changed, or the tokenizer is not as it was."""
        self.tokenizer()
        for number, shard in enumerate(self.manifest.shards):
            recorded = shard.sha256, shard.documents_sha256
            for path, known in zip(_files(self.folder, shard), recorded, strict=True):
                if sha256_of(path) != known:
                    raise ValueError(f"{path} was changed after it was written; restore it, or delete it and {REMEDY}")
            starts, tokens = self._index(number)[:, 0], self._tokens(number)
            if int(tokens.max()) != shard.largest or not np.array_equal(np.flatnonzero(tokens == self.eos), starts):
                raise ValueError(f"{self.folder}: the manifest is not of shard {shard.file}; delete it and {REMEDY}")
            on_bytes(shard.bytes)

    def _tokens(self, number: int) -> np.ndarray:
        shard = self.manifest.shards[number]
        _require_own(self.folder, shard, self.manifest.dtype, self.eos)
        return _map(_files(self.folder, shard)[0], DTYPES[self.manifest.dtype], (shard.tokens,), shard.sha256)

    def _index(self, number: int) -> np.ndarray:
        shard = self.manifest.shards[number]
        return _map(_files(self.folder, shard)[1], INDEX, (shard.documents, 2), shard.documents_sha256)


def count_repeated(trained: TokenShards, heldout: TokenShards) -> int:
    """Documents of `heldout` that stand in `trained` too, token for token; empty ones are not counted.

    Only documents of equal size are compared, and of many candidates as many as takes seconds, from all over the split:
    then there may be more.
    """

    def chosen(shards: TokenShards, sizes: np.ndarray, others: np.ndarray) -> Iterator[bytes]:
        found = np.flatnonzero(np.isin(sizes, others) & (sizes & (2**32 - 1) > 0))
        for number in found[:: -(-len(found) // MOST_COMPARED) or 1]:
            ids = next(shards.documents(int(number), int(number) + 1)).ids
            yield hashlib.sha256(np.asarray(ids, INDEX).tobytes()).digest()

    if trained.manifest.tokenizer["sha256"] != heldout.manifest.tokenizer["sha256"]:
        return 0
    sizes, of_heldout = trained.sizes(), heldout.sizes()
    known = set(chosen(trained, sizes, of_heldout))
    return sum(each in known for each in chosen(heldout, of_heldout, sizes))


@cache  # once for each shard, however often it is mapped
def _require_own(folder: Path, shard: TokenShard, dtype: str, eos: int) -> None:
    """ValueError if a shard's files were exchanged with another's, as far as a few of its documents show."""
    tokens, documents = _files(folder, shard)
    problem = "is not the file that was written here: was it exchanged with another shard's? Restore it, or delete it"
    if sha256_of(documents) != shard.documents_sha256:
        raise ValueError(f"{documents} {problem} and {REMEDY}")
    starts = _map(documents, INDEX, (shard.documents, 2), shard.documents_sha256)[:, 0]
    some = starts[np.linspace(0, len(starts) - 1, min(len(starts), CHECKED_DOCUMENTS)).astype(int)]
    if (_map(tokens, DTYPES[dtype], (shard.tokens,), shard.sha256)[some] != eos).any():
        raise ValueError(f"{tokens} {problem} and {REMEDY}")


@lru_cache(maxsize=MAX_MAPPED_FILES)
def _map(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], sha256: str) -> np.ndarray:
    """A memory-mapped file, whose pages all processes share. With another `sha256` it is mapped anew."""
    try:
        return np.asarray(np.memmap(path, dtype, mode="r", shape=shape))  # plain arrays are cut faster
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); restore it, or {REMEDY}") from None
