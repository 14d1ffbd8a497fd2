import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_moe.data import BrokenImages
from dit_moe.data.batch_sampler import GlobalBatches, load_batches, micro_batches, rows_of_process

sizes = st.integers(1, 40)


@given(size=sizes, batch_size=st.integers(1, 100), seed=st.integers(0, 5))
def test_every_epoch_is_a_permutation(size, batch_size, seed):
    order = GlobalBatches(size, batch_size, seed)
    epochs = 3
    steps = -(-epochs * size // batch_size)
    stream = list(itertools.chain.from_iterable(order.batch(step) for step in range(steps)))
    assert len(stream) == steps * batch_size
    for epoch in range(epochs):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(size=sizes, batch_size=st.integers(1, 100), steps=st.lists(st.integers(0, 30), min_size=2))
def test_a_batch_does_not_depend_on_which_were_asked_for_before(size, batch_size, steps):
    order = GlobalBatches(size, batch_size, seed=3)
    for step in steps:
        assert order.batch(step) == GlobalBatches(size, batch_size, seed=3).batch(step)


def test_epochs_and_seeds_differ():
    order = GlobalBatches(100, 100, seed=0)
    assert order.batch(0) != order.batch(1)
    assert order.batch(0) != GlobalBatches(100, 100, seed=1).batch(0)


@given(local=st.integers(1, 12), world=st.integers(1, 4), micro_batch=st.none() | st.integers(1, 20))
def test_ranks_and_micro_batches_partition_the_global_batch(local, world, micro_batch):
    parts = [rows_of_process(local * world, micro_batch, rank, world) for rank in range(world)]
    rows = [row for own in parts for part in own for row in part]
    assert rows == list(range(local * world))
    assert all(sum(map(len, own)) == local for own in parts)
    assert micro_batch is None or all(0 < len(part) <= micro_batch for own in parts for part in own)


def test_a_batch_that_processes_cannot_share_equally_is_refused():
    with pytest.raises(ValueError, match="batch_size=10 cannot be shared equally by 4 processes"):
        rows_of_process(10, None, 0, 4)


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="empty"):
        GlobalBatches(0, 4, seed=0)


def test_a_resumed_sampler_continues_the_same_stream():
    order, parts = GlobalBatches(17, 8, seed=0), rows_of_process(8, 3)
    whole = list(micro_batches(order, parts, 0, 10))
    assert len(whole) == 10 * 3
    assert list(micro_batches(order, parts, 4, 10)) == whole[4 * 3 :]


class Squares:
    def __len__(self):
        return 11

    def __getitems__(self, indices):
        return {"square": torch.tensor(indices) ** 2}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_fetches_each_index_list_in_one_call_whatever_the_workers(workers):
    batches = list(micro_batches(GlobalBatches(11, 8, seed=0), rows_of_process(8, 4), 2, 5))
    loaded = [rows["square"].tolist() for rows in load_batches(Squares(), batches, workers)]
    assert loaded == [[i**2 for i in indices] for indices in batches]


class Complaining(Squares):
    def __getitems__(self, indices):
        raise BrokenImages({indices[0]: "cats/1.jpg is no image"})


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_data_set_complains_of_is_raised_as_it_is(workers):
    with pytest.raises(BrokenImages, match=r"cats/1.jpg is no image") as raised:
        next(load_batches(Complaining(), [[3, 4]], workers))
    assert raised.value.problems == {3: "cats/1.jpg is no image"}
