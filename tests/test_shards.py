"""Work in shards, by one process; tests/autoencoders/test_encode_processes.py has several, and deaths."""

from typing import TypedDict

import pytest

from dit_moe.json_files import Count
from dit_moe.shards import FixedShards, ShardFolder, in_rounds


class Identity(TypedDict):
    images: str


class Record(TypedDict):
    sum: Count


def make(shards, made, log=None, on_rows=lambda count: None):
    """Shards whose record is the sum of what their rows hold, which is 10 times their number."""

    def shard(number, batches):
        if log is not None:
            log.append(number)
        return sum(sum(content) for _, content in batches)

    def read(batches):
        return ([10 * row for row in rows] for rows in batches)

    return shards.make_missing(made.get, read, shard, on_rows)


def test_every_row_is_in_one_batch_of_one_shard_in_order():
    shards = FixedShards(count=50, size=20, batch_size=8)
    batches = [[len(batch) for batch in shards.batches(shard)] for shard in range(len(shards))]
    assert batches == [[8, 8, 4], [8, 8, 4], [8, 2]]
    rows = [row for shard in range(len(shards)) for batch in shards.batches(shard) for row in batch]
    assert rows == list(range(50)) and shards.rows_in([0, 2]) == 30


def test_what_is_missing_is_made_from_the_contents_of_its_own_rows():
    shards, log = FixedShards(count=5, size=2, batch_size=1), []
    assert make(shards, {}) == {0: 10, 1: 50, 2: 40}
    assert make(shards, {1: 7}, log) == {0: 10, 1: 7, 2: 40}
    assert log == [0, 2]


def test_progress_counts_the_rows_that_were_missing():
    told = []
    make(FixedShards(count=5, size=2, batch_size=2), {0: 10}, on_rows=told.append)
    assert told == [2, 1]


def test_an_error_ends_the_rounds_and_keeps_its_type():
    def work():
        yield 1
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError, match="gone"):
        in_rounds(work())
    assert in_rounds(iter("abc")) == ["a", "b", "c"]


def test_files_of_other_programs_are_not_taken_for_ours(tmp_path):
    files = ShardFolder(tmp_path, Identity, Record)
    files.require_own()
    (tmp_path / "manifest.json").write_text('{"encoding": "utf-8"}')
    with pytest.raises(ValueError, match=r"manifest.json is there already, and nothing says that dit-moe wrote it"):
        files.require_own()
    files.begin({"images": "digits"})
    files.require_own()


def test_an_identity_holds_from_the_first_record_on(tmp_path):
    files = ShardFolder(tmp_path, Identity, Record)
    files.begin({"images": "digits"})
    assert files.identity() is None
    files.write_record(3, {"sum": 1})
    assert files.identity() == {"images": "digits"}
    assert files.record(3) == {"sum": 1} and files.record(4) is None
    files.write_record(3, {"sum": -1})
    assert files.record(3) is None
    (tmp_path / "encoding.json").write_text("[")
    with pytest.raises(ValueError, match=r"encoding.json is truncated.*; restore it from a copy, or name"):
        files.identity()
