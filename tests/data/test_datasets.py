"""What every registered dataset promises."""

import pytest
import torch

from dit_moe.data import DATASETS, images
from dit_moe.data.batch_sampler import GlobalBatches, load_batches, micro_batches
from tests.data.examples import example


@pytest.fixture(scope="module", params=DATASETS.names())
def name(request):
    if request.param == "huggingface":
        pytest.importorskip("datasets")
    return request.param


@pytest.fixture(scope="module")
def config(name, tmp_path_factory):
    return example(name, tmp_path_factory.mktemp(name))


@pytest.fixture(params=["train", "heldout"])
def dataset(config, request):
    return DATASETS.build(config, request.param)


def test_a_batch_holds_int64_labels_of_the_stated_classes_and_uint8_images_of_the_stated_shape_or_moments(dataset):
    batch = dataset.__getitems__(range(len(dataset)))
    labels = batch["labels"]
    assert labels.shape == (len(dataset),) and labels.dtype == torch.int64
    assert labels.unique().tolist() == list(range(len(dataset.class_names)))
    if "images" in batch:
        assert set(batch) == {"images", "labels"}
        assert batch["images"].shape == (len(dataset), *dataset.image_shape) and batch["images"].dtype == torch.uint8
    else:
        assert set(batch) == {"moments", "labels"}
        assert batch["moments"].shape[:1] == (len(dataset),) and batch["moments"].shape[1] in (1, 2)
        assert batch["moments"].dtype in (torch.float16, torch.bfloat16, torch.float32)


def test_rows_come_in_the_order_asked_repeats_included(dataset):
    everything, batch = dataset.__getitems__(range(len(dataset))), dataset.__getitems__([5, 0, 5])
    for key in batch:
        assert torch.equal(batch[key], everything[key][[5, 0, 5]])


def test_class_counts_are_of_the_images_and_no_image_is_read_for_them(dataset, monkeypatch):
    def refuse(*args):
        raise AssertionError("an image was read")

    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", refuse)
        counts = dataset.class_counts()
    labels = dataset.__getitems__(range(len(dataset)))["labels"]
    ways = len(dataset) // sum(counts)  # mirrored ones are rows too
    assert len(counts) == len(dataset.class_names) and labels.bincount().tolist() == [ways * each for each in counts]


def test_changing_a_batch_does_not_change_the_data(dataset):
    before = dataset.__getitems__([0])
    for rows in dataset.__getitems__([0]).values():
        rows.fill_(7)
    for key, rows in dataset.__getitems__([0]).items():
        assert torch.equal(rows, before[key])


def test_processes_that_read_ahead_read_the_same(config):
    dataset = DATASETS.build(config, "train")
    batches = list(micro_batches(GlobalBatches(len(dataset), 4, seed=0), [range(4)], 0, 3))
    for alone, ahead in zip(load_batches(dataset, batches), load_batches(dataset, batches, workers=2), strict=True):
        for key in alone:
            assert torch.equal(alone[key], ahead[key])


def test_the_fingerprint_is_of_the_content_wherever_it_lies(name, config, tmp_path):
    first, second = (DATASETS.build(each, "train") for each in (config, example(name, tmp_path)))
    assert first.fingerprint == second.fingerprint


def test_an_unknown_split_is_refused_with_the_known_ones(config):
    with pytest.raises(ValueError, match="no split 'test'; known: train, heldout"):
        DATASETS.build(config, "test")
