"""Images reach the main process in order, a round at a time, from any number of processes."""

import json

import pytest

from tests.distributed.streaming import streaming


@pytest.fixture(scope="module", params=[1, 3])
def ranks(request, processes, tmp_path_factory):
    folder = processes
    if request.param == 1:
        folder = tmp_path_factory.mktemp("ranks")
        streaming(folder)
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_the_main_process_gets_every_image_once_and_in_order(ranks, count):
    took, *others = (rank[f"took_{count}"] for rank in ranks)
    assert [i for batch in took for i in batch] == list(range(count))
    assert max(map(len, took)) <= 3 * len(ranks)  # a round of batches, never more
    assert not any(others)


def test_all_of_them_can_be_had_in_memory(ranks):
    assert [rank["together"] for rank in ranks] == [list(range(7)), *[None] * (len(ranks) - 1)]


def test_a_full_disk_on_the_main_process_stops_them_all(ranks):
    assert [rank["full"] for rank in ranks] == ["OSError: no space left"] * len(ranks)
