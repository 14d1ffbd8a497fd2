import errno

import pytest

from dit_moe import checkpoint
from dit_moe.training import TrainingError
from tests.training.tiny_run import bits


def test_workers_do_not_change_the_run(build, unbroken, tmp_path):
    build(tmp_path, steps=10, workers=2).train()
    assert bits(tmp_path, 10) == bits(unbroken, 10)


def test_every_batch_is_read_once_and_none_past_the_end(build, tmp_path):
    trainer = build(tmp_path, steps=5, micro_batch=16)
    trainer.train()
    batches = [trainer.prefetcher.batches.batch(step) for step in range(5)]
    assert trainer.prefetcher.dataset.asked == [part for batch in batches for part in (batch[:16], batch[16:])]


@pytest.mark.parametrize("family", ["DiT"], indirect=True)
def test_what_the_preparation_refuses_is_reported_with_step_and_rows(build, tmp_path):
    def prepare(raw, random):
        raise ValueError("the latents are not finite")

    trainer = build(tmp_path, prepare_batch=prepare)
    with pytest.raises(TrainingError, match=r"^step 1: the latents are not finite \(rows "):
        trainer.train()


@pytest.mark.parametrize("family", ["DiT"], indirect=True)
def test_rows_that_cannot_be_read_end_the_run_after_the_step_before(build, tmp_path):
    trainer = build(tmp_path, checkpoint_every=1)
    read = trainer.prefetcher.dataset.dataset.__getitems__

    class Vanishing:
        def __getitems__(self, indices):
            if indices == trainer.prefetcher.batches.batch(3):
                raise OSError(errno.EIO, "Input/output error", "shard_3")
            return read(indices)

    trainer.prefetcher.dataset.dataset = Vanishing()
    with pytest.raises(TrainingError, match=r"stopped after step 3: .*Input/output error: 'shard_3'"):
        trainer.train()
    assert checkpoint.open_checkpoint(tmp_path).step == 3
