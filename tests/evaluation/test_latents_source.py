"""Encoded latents as images: what their autoencoder makes of the mean of each."""

import json
import shutil

import pytest
import torch

from dit_moe.data import DATASETS
from dit_moe.data.latents import LatentsConfig
from dit_moe.evaluation.sources import dataset
from dit_moe.evaluation.sources.dataset import open_dataset, open_latents
from tests.autoencoders.encoded import DIGITS, autoencoder, encode


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """50 digits, both ways round, in three shards."""
    place = tmp_path_factory.mktemp("made") / "latents"
    encode(place)
    return place


def test_images_are_the_decoded_means_of_the_entries_that_are_not_mirrored(folder):
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


def test_images_are_the_same_for_any_parts_and_order(folder):
    source = open_latents(folder)
    whole = next(source.batches([range(50)]))
    parts = [[49, 0, 21], [], [20, 20]]
    for part, images in zip(parts, source.batches(parts), strict=True):
        assert torch.equal(images, whole[part])


def test_a_dataset_of_latents_is_decoded_with_its_held_out_part_and_without_mirrored_rows(folder):
    opened = open_dataset(LatentsConfig(path=str(folder), heldout=str(folder), flip=True))
    assert len(opened.source) == len(opened.heldout) == 50
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
