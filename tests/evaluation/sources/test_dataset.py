"""Registered datasets as images to compare with, encoded latents among them."""

import json
import os
import shutil
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dit_moe.autoencoders.base import Identity, IdentityConfig
from dit_moe.data import DATASETS
from dit_moe.data.latents import LatentsConfig
from dit_moe.evaluation.runs import GeneratedSource
from dit_moe.evaluation.sources import ReadOptions, dataset
from dit_moe.evaluation.sources.base import Reconstructed
from dit_moe.evaluation.sources.dataset import open_dataset, open_latents
from tests.autoencoders.encoded import DIGITS, First, autoencoder, encode
from tests.data.examples import EXAMPLES, class_files, encoded, example, pixels, write_tree


@pytest.fixture(scope="module", params=sorted(set(EXAMPLES) - {"latents"}))
def opened(request, tmp_path_factory):
    """Of each dataset of images: what `open_dataset` makes of its example, and the dataset itself, never mirrored."""
    config = example(request.param, tmp_path_factory.mktemp("data"))
    plain = replace(config, flip=False) if "flip" in {field.name for field in fields(config)} else config
    return open_dataset(config), DATASETS.build(plain, "train"), request.param


NAME_OF = {
    "digits": lambda dataset: "digits/train",
    "huggingface": lambda dataset: f"{dataset.config.id}, train",
    "image_folder": lambda dataset: dataset.config.path,
    "tars": lambda dataset: dataset.config.path,
    "torchvision": lambda dataset: dataset.place,
}


def test_splits_of_one_folder_go_by_its_path_and_by_what_they_are(tmp_path):
    folder = write_tree(tmp_path, class_files(30))
    opened = open_dataset(image_folder(folder, heldout=0.4))
    names = [opened.source.name, opened.heldout.name]
    assert names == [f"{folder} (trained on)", f"{folder} (held out)"]


def test_a_source_has_each_image_of_training_once_in_order_with_labels(opened):
    found, dataset, name = opened
    rows = dataset.__getitems__(range(len(dataset)))
    assert len(found.source) == len(dataset) and found.source.name == NAME_OF[name](dataset)
    assert found.source.image_shape == tuple(rows["images"].shape[1:])
    assert torch.equal(torch.as_tensor(found.source.labels_N), rows["labels"])
    parts = [[2, 0], [], list(range(len(dataset)))]
    for part, images in zip(parts, found.source.batches(parts), strict=True):
        assert torch.equal(images, rows["images"][part])


def test_the_held_out_images_come_along_with_an_identity_of_their_own_and_identities_have_no_paths(opened):
    found, _, _ = opened
    assert len(found.heldout) > 0 and found.heldout.name not in (found.source.name, "train")
    identity = found.source.identity()
    assert identity["kind"] == "dataset" and identity["split"] == "train" and identity != found.heldout.identity()
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


def test_identity_of_generated_images_has_their_labels():
    class Generator(SimpleNamespace):
        def decode(self, latents):
            return latents

    generator = Generator(latent_shape=(1, 2, 2), device="cpu", config=SimpleNamespace(batch_size=2))
    one, other = (
        GeneratedSource(generator, torch.tensor(labels), name="run", identity={"step": 1}).identity()
        for labels in ([0, 1], [1, 1])
    )
    assert one != other


def test_held_out_images_may_be_missing_unless_the_config_says_where_they_are(tmp_path):
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


def test_an_image_that_is_broken_or_gone_is_named_with_a_remedy(tmp_path):
    folder = write_tree(tmp_path / "a", class_files(2) | {"ant/000.png": b"no image"})
    source = open_dataset(image_folder(folder, size=8)).source
    with pytest.raises(ValueError, match=r"ant/000.png is not an image.*; mend what is broken, or leave it out by"):
        list(source.batches([[0, 1]]))
    (folder / "ant" / "000.png").unlink()
    with pytest.raises(ValueError, match=r"ant/000.png cannot be read \(No such file.*; mend it, or leave it out by"):
        source.identity()


def test_every_split_can_be_opened_and_an_unknown_one_is_refused():
    digits = DATASETS.config_class("digits")()
    source = open_dataset(digits, "extractor").source
    assert len(source) == 449 and np.bincount(source.labels_N).min() > 30
    with pytest.raises(ValueError, match=r"no split 'test'; .*known: train, heldout, extractor"):
        open_dataset(digits, "test")


# ------------------------------------------------------------------------------------------------------------- latents


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """50 digits, both ways round, in three shards."""
    place = tmp_path_factory.mktemp("made") / "latents"
    encode(place)
    return place


def test_images_are_the_decoded_means_of_the_entries_that_are_not_mirrored_in_any_parts_and_order(folder):
    source = open_latents(folder)
    assert (len(source), source.image_shape) == (50, (1, 16, 16))
    digits = DATASETS.build(DIGITS, "train").__getitems__(range(50))
    assert torch.equal(source.labels_N, digits["labels"])
    stage = autoencoder(folder.parent / "autoencoder")
    means = stage.encode(digits["images"]).mean.half()  # as shards keep them, but for scale and shift
    images = torch.cat(list(source.batches([range(50)])))
    wanted = torch.cat([stage.decode(mean[None].float()) for mean in means])
    assert images.dtype == torch.uint8
    assert (images.int() - wanted.int()).abs().max() <= 1  # fp16 of raw latents, not of scaled ones
    parts = [[49, 0, 21], [], [20, 20]]
    assert all(torch.equal(found, images[part]) for part, found in zip(parts, source.batches(parts), strict=True))


def test_a_dataset_of_latents_is_decoded_with_its_held_out_part_and_without_mirrored_rows(folder):
    heldout = folder.with_name("heldout")
    encode(heldout, dataset=First(DATASETS.build(DIGITS, "heldout"), 20))
    opened = open_dataset(LatentsConfig(path=str(folder), heldout=str(heldout), flip=True))
    assert (len(opened.source), len(opened.heldout)) == (50, 20)
    assert opened.source.identity() == open_latents(folder).identity()
    assert opened.source.stage is opened.heldout.stage
    assert open_dataset(LatentsConfig(path=str(folder))).heldout is None


def test_identity_is_of_the_latents_and_their_autoencoder(folder, tmp_path):
    identity = open_latents(folder).identity()
    assert identity == json.loads(json.dumps(identity)) and identity["kind"] == "latents"
    assert len(identity["autoencoder"]["sha256"]) == 64 and str(folder.parent) not in json.dumps(identity)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert open_latents(copy).identity() == identity
    encode(tmp_path / "other", stage=autoencoder(tmp_path / "autoencoder", seed=1))
    other = open_latents(tmp_path / "other").identity()
    assert other["fingerprint"] != identity["fingerprint"] and other["autoencoder"] != identity["autoencoder"]


def test_an_autoencoder_that_is_gone_or_another_is_its_error_before_the_work(tmp_path):
    encode(tmp_path / "latents")
    dataset._load.cache_clear()
    autoencoder(tmp_path / "autoencoder", seed=1)
    with pytest.raises(ValueError, match=r"latents: its autoencoder cannot be loaded: .*use that autoencoder; put it"):
        open_latents(tmp_path / "latents")
    shutil.rmtree(tmp_path / "autoencoder")
    with pytest.raises(ValueError, match=r"latents: its autoencoder cannot be loaded: .*autoencoder has no readable"):
        open_latents(tmp_path / "latents")


def test_a_folder_without_finished_latents_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="holds no encoded latents; run `dit-moe encode"):
        open_latents(tmp_path)
    unfinished = shutil.copytree(folder, tmp_path / "unfinished")
    (unfinished / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds an unfinished encoding"):
        open_latents(unfinished)


def test_images_are_reconstructed_in_parts_of_the_size_that_sampling_decodes():
    class Halved(Identity):
        sizes: list[int] = []  # noqa: RUF012

        def decode(self, latents_BCHW):
            self.sizes.append(len(latents_BCHW))
            return super().decode(latents_BCHW / 2)

    images = open_dataset(DIGITS).source
    whole, parts = (Reconstructed(images, Halved(IdentityConfig()), few) for few in (None, 3))
    assert torch.equal(next(whole.batches([range(8)])), next(parts.batches([range(8)])))
    assert Halved.sizes == [8, 3, 3, 2]
