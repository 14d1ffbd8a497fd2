"""Work in shards: stopped and continued at will, by any number of processes, with always the same bytes.

A shard is made whole by one process and takes its name when it is complete. What is there already is checked and kept.
What a shard holds depends on its number alone: not on how many processes there are, nor on when they were stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from dit_moe.config import Tree
from dit_moe.distributed import from_main, join_processes, on_all, on_main
from dit_moe.files import require_own, write_atomically
from dit_moe.json_files import read, read_if_good, read_object

T = TypeVar("T")
Rows = TypeVar("Rows")

MANIFEST, ENCODING, SHARDS = "manifest.json", "encoding.json", "shards"


def in_rounds(work: Iterator[T]) -> list[T]:
    """Run the `work` of each process, one item at a time, until all have finished; returns the items of all.

    The processes meet after every item, so that none waits long for another, and an error of one ends all of them.
    """
    items: list[T] = []
    while any(found := on_all(lambda: list(islice(work, 1)))):
        items += [item for each in found for item in each]
    return items


@dataclass(frozen=True)
class FixedShards:
    """`count` rows cut into shards of `size`, which are worked on in batches that begin with a shard's first row."""

    count: int
    size: int
    batch_size: int

    def __len__(self) -> int:
        return math.ceil(self.count / self.size)

    def rows(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.size, min((shard + 1) * self.size, self.count))

    def rows_in(self, shards: Sequence[int]) -> int:
        """How many rows these shards have together."""
        return sum(len(self.rows(shard)) for shard in shards)

    def batches(self, shard: int) -> list[list[int]]:
        """The rows of a shard, batch by batch."""
        rows = self.rows(shard)
        return [list(rows[start : start + self.batch_size]) for start in range(0, len(rows), self.batch_size)]

    def make_missing(
        self,
        find: Callable[[int], T | None],
        read: Callable[[list[list[int]]], Iterator[Rows]],
        make: Callable[[int, Iterator[tuple[list[int], Rows]]], T],
        on_rows: Callable[[int], object] = lambda count: None,
    ) -> dict[int, T]:
        """Make every shard that is not there; all processes take part, and each gets the records of all shards.

        Args:
            find: the record of a shard, or None if the shard is to be made. Only the main process asks, since the
                others' view of a shared disk may be old.
            read: yields what each of the given batches of rows holds; it may read ahead.
            make: makes a shard of (rows, what they hold) of each of its batches, and returns its record.
            on_rows: called with the number of rows after each batch of this process.
        """
        records = from_main(lambda: {shard: found for shard in range(len(self)) if (found := find(shard)) is not None})
        missing = [shard for shard in range(len(self)) if shard not in records]
        state = join_processes()
        own = missing[state.process_index :: state.num_processes]
        contents = read([batch for shard in own for batch in self.batches(shard)])

        def batches_of(shard: int) -> Iterator[tuple[list[int], Rows]]:
            for rows, content in zip(self.batches(shard), contents, strict=False):  # the next shard takes the rest
                yield rows, content
                on_rows(len(rows))

        return records | dict(in_rounds((shard, make(shard, batches_of(shard))) for shard in own))


class ShardFolder:
    """The files of work whose shards have records.

        encoding.json       what is made of what, and how: its identity, written first
        shards/00000.…      what the shard holds
        shards/00000.json   its record, written after it
        manifest.json       written last, from the records; it has the identity under "encoding"

    Args:
        folder: where they are.
        identity: a TypedDict, whose keys tell the identity from another program's file of that name.
        record: a TypedDict of a shard's record.
    """

    def __init__(self, folder: Path, identity: type, record: type) -> None:
        self.folder, self._identity, self._record = folder, identity, record

    def require_own(self, *others: str) -> None:
        """ValueError if there are files of these names, or of those `others`, in a folder that we did not begin."""
        begun, finished = read_object(self.folder / ENCODING), read_object(self.folder / MANIFEST).get("encoding")
        keys = self._identity.__annotations__.keys()
        own = any(isinstance(each, dict) and each.keys() >= keys for each in (begun, finished))
        require_own(self.folder, (MANIFEST, ENCODING, SHARDS, *others), own)

    def identity(self) -> Tree | None:
        """The identity of the shards that are there; None if there are none, so that all may still be changed."""
        path = self.folder / ENCODING
        has_records = path.is_file() and any((self.folder / SHARDS).glob("*.json"))
        remedy = "restore it from a copy, or name another folder"
        return dict(read(path, self._identity, remedy)) if has_records else None

    def begin(self, identity: Tree) -> None:
        """Write the identity; all processes call it."""
        on_all(lambda: (self.folder / SHARDS).mkdir(parents=True, exist_ok=True))
        on_main(lambda: write_atomically(self.folder / ENCODING, json.dumps(identity, indent=1) + "\n"))

    def path(self, shard: int, suffix: str) -> Path:
        return self.folder / SHARDS / f"{shard:05d}{suffix}"

    def record(self, shard: int) -> Tree | None:
        """The record of a shard; None if there is none, or a damaged one. OSError for one that cannot be read."""
        found = read_if_good(self.path(shard, ".json"), self._record)
        return None if found is None else dict(found)

    def write_record(self, shard: int, record: Tree) -> None:
        write_atomically(self.path(shard, ".json"), json.dumps(record) + "\n")
