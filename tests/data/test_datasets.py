"""What every registered dataset promises."""

import pytest
import torch

from dit_moe.data import DATASETS


@pytest.fixture(params=DATASETS.names())
def config(request):
    return DATASETS.config_class(request.param)()


@pytest.fixture(params=["train", "heldout"])
def dataset(config, request):
    return DATASETS.build(config, request.param)


def test_a_batch_holds_uint8_images_and_int64_labels_of_the_stated_shape_and_classes(dataset):
    batch = dataset.__getitems__(range(len(dataset)))
    assert batch["images"].shape == (len(dataset), *dataset.image_shape) and batch["images"].dtype == torch.uint8
    assert batch["labels"].shape == (len(dataset),) and batch["labels"].dtype == torch.int64
    assert batch["labels"].unique().tolist() == list(range(len(dataset.class_names)))


def test_rows_come_in_the_order_asked_repeats_included(dataset):
    everything, batch = dataset.__getitems__(range(len(dataset))), dataset.__getitems__([5, 0, 5])
    for key in batch:
        assert torch.equal(batch[key], everything[key][[5, 0, 5]])


def test_changing_a_batch_does_not_change_the_data(dataset):
    before = dataset.__getitems__([0])["images"].clone()
    dataset.__getitems__([0])["images"].fill_(7)
    assert torch.equal(dataset.__getitems__([0])["images"], before)


def test_an_unknown_split_is_refused_with_the_known_ones(config):
    with pytest.raises(ValueError, match="no split 'test'; known: train, heldout"):
        DATASETS.build(config, "test")
