"""Registered datasets as images to compare with."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dit_moe.data import DATASETS
from dit_moe.evaluation.sources import dataset
from dit_moe.evaluation.sources.base import ReadOptions
from dit_moe.evaluation.sources.dataset import open_dataset
from dit_moe.evaluation.sources.generated import GeneratedSource
from tests.data.examples import EXAMPLES, class_files, encoded, example, pixels, write_tree


@pytest.fixture(scope="module", params=sorted(set(EXAMPLES) - {"latents"}))
def opened(request, tmp_path_factory):
    """Of each dataset of images: what `open_dataset` makes of its example, and the dataset itself, never mirrored."""
    from dataclasses import fields, replace

    config = example(request.param, tmp_path_factory.mktemp("data"))
    plain = replace(config, flip=False) if "flip" in {field.name for field in fields(config)} else config
    return open_dataset(config), DATASETS.build(plain, "train"), request.param


def test_a_source_has_each_image_of_training_once_in_order_with_labels(opened):
    found, dataset, name = opened
    rows = dataset.__getitems__(range(len(dataset)))
    assert len(found.source) == len(dataset) and found.source.name == f"{name}/train"
    assert found.source.image_shape == tuple(rows["images"].shape[1:])
    assert torch.equal(torch.as_tensor(found.source.labels_N), rows["labels"])
    parts = [[2, 0], [], list(range(len(dataset)))]
    for part, images in zip(parts, found.source.batches(parts), strict=True):
        assert torch.equal(images, rows["images"][part])


def test_the_held_out_images_come_along(opened):
    found, _, name = opened
    assert found.heldout is not None and len(found.heldout) > 0 and found.heldout.name == f"{name}/heldout"


def test_identity_has_no_paths(opened):
    identity = opened[0].source.identity()
    assert identity["kind"] == "dataset" and identity["split"] == "train" and identity != opened[0].heldout.identity()
    assert identity == json.loads(json.dumps(identity)) and "/" not in json.dumps(identity)


def image_folder(folder, **options):
    return DATASETS.config_class("image_folder")(path=str(folder), **options)


def test_identity_follows_the_data_and_what_is_made_of_it_but_not_the_place_or_mirroring(tmp_path):
    a, b = (write_tree(tmp_path / name, class_files(2)) for name in ("a", "b"))
    other = write_tree(tmp_path / "other", class_files(3))
    identities = [
        open_dataset(config).source.identity()
        for config in (image_folder(a), image_folder(b, flip=True), image_folder(other), image_folder(a, size=8))
    ]
    assert identities[0] == identities[1] and identities[2] != identities[0] != identities[3]


def test_identity_follows_pixels_that_were_replaced_under_the_same_names_and_sizes(tmp_path):
    folder = write_tree(tmp_path / "a", class_files(2))
    before = open_dataset(image_folder(folder)).source.identity()
    file = folder / "ant" / "000.png"
    content, stat = bytearray(file.read_bytes()), file.stat()
    content[-20] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    source = open_dataset(image_folder(folder)).source
    assert source.dataset.fingerprint == DATASETS.build(image_folder(folder), "train").fingerprint
    assert source.identity() != before and "compared_by" not in source.facts()


def test_identity_of_a_data_set_without_files_is_of_its_rows(monkeypatch):
    config = DATASETS.config_class("digits")()
    sources = [open_dataset(config).source for _ in range(3)]
    sources[1].dataset._images_NCHW = sources[1].dataset._images_NCHW.clone()
    sources[1].dataset._images_NCHW[700, 0, 3, 3] ^= 1
    sources[2].dataset._labels_N = sources[2].dataset._labels_N.roll(1)
    plain, pixel, labels = (source.identity() for source in sources)
    assert plain["sha256"] != pixel["sha256"] and plain["sha256"] == labels["sha256"] and plain != labels


def test_a_large_data_set_is_compared_by_its_listing_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "READ_AT_MOST", 3)
    folder = write_tree(tmp_path / "a", class_files(2))
    monkeypatch.setattr(dataset, "_content", None)  # no image is read
    before = open_dataset(image_folder(folder)).source
    assert before.facts()["compared_by"] == "listing"
    assert open_dataset(image_folder(folder)).source.identity() == before.identity()
    os.utime(folder / "ant" / "000.png", ns=(0, 0))
    assert open_dataset(image_folder(folder)).source.identity() != before.identity()


def test_an_image_that_cannot_be_read_is_named_when_the_identity_is_asked_for(tmp_path):
    folder = write_tree(tmp_path / "a", class_files(2))
    source = open_dataset(image_folder(folder)).source
    (folder / "ant" / "000.png").unlink()
    with pytest.raises(ValueError, match=r"ant/000.png cannot be read \(No such file.*; mend it, or take it out"):
        source.identity()


def test_identity_of_generated_images_has_their_labels():
    class Generator(SimpleNamespace):
        def decode(self, latents):
            return latents

    generator = Generator(latent_shape=(1, 2, 2), device="cpu", config=SimpleNamespace(batch_size=2))
    one, same, other = (
        GeneratedSource(generator, torch.tensor(labels), name="run", identity={"step": 1}).identity()
        for labels in ([0, 1], [0, 1], [1, 1])
    )
    assert one == same != other


def test_mirrored_rows_do_not_count(tmp_path):
    folder = write_tree(tmp_path / "a", class_files(2))
    assert len(open_dataset(image_folder(folder, flip=True)).source) == 4


def test_without_held_out_images_there_are_none_but_stated_ones_must_be_there(tmp_path):
    folder = write_tree(tmp_path / "a", class_files(2))
    assert open_dataset(image_folder(folder)).heldout is None
    assert open_dataset(image_folder(folder, heldout=str(folder)), "heldout").heldout is None
    with pytest.raises(ValueError, match=r"heldout=.*nowhere does not exist"):
        open_dataset(image_folder(folder, heldout=str(tmp_path / "nowhere")))


def test_an_open_size_is_the_size_asked_for(tmp_path):
    mixed = {f"k/{i}.png": encoded(pixels(i, height=16 + i, width=20)) for i in range(3)}
    folder = write_tree(tmp_path / "a", mixed)
    assert open_dataset(image_folder(folder), options=ReadOptions(size=8)).source.image_shape == (3, 8, 8)
    assert open_dataset(image_folder(folder, size=12), options=ReadOptions(size=8)).source.image_shape == (3, 12, 12)


def test_images_are_the_same_for_any_number_of_workers(tmp_path):
    folder = write_tree(tmp_path / "a", class_files(4))
    parts = [[7, 0], [3, 3, 1]]
    alone, helped = (
        open_dataset(image_folder(folder), options=ReadOptions(workers=n)).source.batches(parts) for n in (0, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_a_broken_image_is_named_with_a_remedy_that_is_for_here(tmp_path):
    folder = write_tree(tmp_path / "a", class_files(2) | {"ant/000.png": b"no image"})
    with pytest.raises(ValueError, match=r"ant/000.png is not an image.*; mend what is broken, or take it out"):
        list(open_dataset(image_folder(folder, size=8)).source.batches([[0, 1]]))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"no split 'test'; .*known: train, heldout, extractor"):
        open_dataset(DATASETS.config_class("digits")(), "test")


def test_the_digits_split_of_the_extractor_can_be_looked_at():
    source = open_dataset(DATASETS.config_class("digits")(), "extractor").source
    assert len(source) == 449 and np.bincount(source.labels_N).min() > 30
