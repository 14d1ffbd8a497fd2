"""Encoding: always the same bytes, however often stopped, and nothing half-written is read."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dit_moe.autoencoders.autoencoder import Autoencoder, AutoencoderConfig
from dit_moe.autoencoders.encode import check_shards, reconstruct
from dit_moe.autoencoders.encoder import BROKEN, EncodeConfig, EncodingError
from dit_moe.data import DATASETS
from dit_moe.data.latents import NoLatents, read_manifest, write_manifest
from tests.autoencoders.encoded import DIGITS, Spoilt, autoencoder, bits, encode, encoder


@pytest.fixture
def spoilt():
    return Spoilt(DATASETS.build(DIGITS, "train"), 50)


def test_shards_hold_the_moments_of_each_image_and_of_its_mirror(tmp_path):
    stage = autoencoder(tmp_path / "autoencoder")
    encode(tmp_path / "latents", stage=stage, dtype="fp32")
    rows = DATASETS.build(DIGITS, "train").__getitems__(range(50))
    shards = [load_file(path) for path in sorted((tmp_path / "latents").glob("shards/*.safetensors"))]
    assert [len(shard["labels"]) for shard in shards] == [20, 20, 10]
    moments = torch.cat([shard["moments"] for shard in shards])
    for way, images in enumerate([rows["images"], rows["images"].flip(-1)]):
        wanted = stage.encode_raw(images)
        assert torch.allclose(moments[:, way, 0], wanted.mean, atol=1e-5)
        assert torch.allclose(moments[:, way, 1], wanted.std, atol=1e-5)
    assert torch.equal(torch.cat([shard["labels"] for shard in shards]), rows["labels"])
    assert torch.equal(torch.cat([shard["index"] for shard in shards]), torch.arange(50))


def test_the_manifest_says_what_the_latents_are(tmp_path):
    stage = autoencoder(tmp_path / "autoencoder")
    manifest = encode(tmp_path / "latents", stage=stage)
    assert (len(manifest), manifest.latent_shape, manifest.image_shape) == (50, (4, 4, 4), (1, 16, 16))
    assert (manifest.moments, manifest.flips, manifest.dtype) == (2, True, "fp16")
    assert manifest.class_names == tuple("0123456789")
    assert manifest.autoencoder["sha256"] == stage.config.sha256
    assert read_manifest(tmp_path / "latents") == manifest


def test_the_statistics_are_those_of_sampled_latents(tmp_path):
    manifest = encode(tmp_path / "latents", dtype="fp32")
    moments = torch.cat(
        [load_file(path)["moments"] for path in sorted((tmp_path / "latents").glob("shards/*.safetensors"))]
    ).double()
    mean, std = moments[:, :, 0], moments[:, :, 1]
    draws = mean + std * torch.randn(400, *mean.shape, generator=torch.Generator().manual_seed(0))
    assert manifest.mean == pytest.approx(mean.mean((0, 1, 3, 4)).tolist(), abs=1e-12)
    assert manifest.std == pytest.approx(draws.std((0, 1, 2, 4, 5)).tolist(), rel=2e-3)  # 640 000 draws a channel


def test_a_deterministic_autoencoder_has_one_moment(tmp_path):
    from tests.autoencoders.small import make

    stage = Autoencoder(
        AutoencoderConfig(model=make(tmp_path / "tiny", "AutoencoderTiny", in_channels=1, out_channels=1))
    )
    manifest = encode(tmp_path / "latents", stage=stage, flips=False)
    assert (manifest.moments, manifest.flips) == (1, False)
    rows = DATASETS.build(DIGITS, "train").__getitems__(range(8))
    stored = load_file(tmp_path / "latents" / "shards" / "00000.safetensors")["moments"][:8, 0]
    moments = stage.moments_of({"moments": stored})
    assert moments.std is None and torch.allclose(moments.mean, stage.encode(rows["images"]).mean, atol=2e-3)


def test_shards_that_are_lost_or_damaged_are_made_anew_with_the_same_bytes(tmp_path):
    encode(tmp_path / "latents")
    before, shards = bits(tmp_path / "latents"), tmp_path / "latents" / "shards"
    (shards / "00000.safetensors").unlink()
    (shards / "00001.safetensors").write_bytes(b"short")
    (shards / "00002.json").unlink()
    assert encoder(tmp_path / "latents").missing() == [0, 1, 2]
    encode(tmp_path / "latents")
    assert bits(tmp_path / "latents") == before


def test_finished_latents_are_not_encoded_again(tmp_path):
    encode(tmp_path / "latents")
    again = encoder(tmp_path / "latents")
    assert again.missing() == []
    again.stage.encode_raw = None  # would be called
    again.run()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"dtype": "bf16"}, "encode.dtype"),
        ({"flips": False}, "encode.flips"),
        ({"shard_size": 30}, "encode.shard_size"),
    ],
)
def test_an_encoding_goes_on_only_as_it_was_begun(tmp_path, options, key):
    encode(tmp_path / "latents")
    before = bits(tmp_path / "latents")
    with pytest.raises(ValueError, match=f"{key}=.* differs from the encoding in .*, which has"):
        encode(tmp_path / "latents", **options)
    with pytest.raises(ValueError, match=r"encode.first_stage.sha256=.* differs"):
        encode(tmp_path / "latents", stage=autoencoder(tmp_path / "other", seed=1))
    assert bits(tmp_path / "latents") == before


def test_broken_images_are_listed_and_all_else_is_kept(tmp_path, spoilt):
    folder = tmp_path / "latents"
    with pytest.raises(EncodingError, match=r"images/3.jpg is no image and 2 more, listed in .*broken.json; mend"):
        encode(folder, dataset=spoilt)
    assert [entry["index"] for entry in json.loads((folder / BROKEN).read_text())] == [3, 7, 25]
    assert encoder(folder, dataset=spoilt).missing() == [0, 1]  # the third shard has none of them
    with pytest.raises(NoLatents):
        read_manifest(folder)


def test_broken_images_are_left_out_on_demand_and_named_in_the_manifest(tmp_path, spoilt):
    folder = tmp_path / "latents"
    folder.mkdir()
    manifest = encoder(folder, dataset=spoilt).run(skip_broken=True)
    assert len(manifest) == 47 and [shard.count for shard in manifest.shards] == [18, 19, 10]
    assert [i for i, _ in manifest.skipped] == [3, 7, 25]
    index = torch.cat([load_file(path)["index"] for path in sorted(folder.glob("shards/*.safetensors"))])
    assert index.tolist() == [i for i in range(50) if i not in Spoilt.broken]
    check_shards(folder)


def test_a_shard_of_nothing_but_broken_images_is_empty_and_harmless(tmp_path, spoilt):
    spoilt.broken = range(20, 40)
    (tmp_path / "latents").mkdir()
    assert len(encoder(tmp_path / "latents", dataset=spoilt).run(skip_broken=True)) == 30
    dataset = DATASETS.build(DATASETS.config_class("latents")(path=str(tmp_path / "latents")), "train")
    rows = DATASETS.build(DIGITS, "train").__getitems__([*range(20), *range(40, 50)])
    assert torch.equal(dataset.__getitems__(range(30))["labels"], rows["labels"])


def test_images_that_were_mended_come_back(tmp_path, spoilt):
    folder = tmp_path / "latents"
    with pytest.raises(EncodingError, match=r"; mend them in place and run the same command again, or leave them out"):
        encode(folder, dataset=spoilt)
    encoder(folder, dataset=spoilt).run(skip_broken=True)
    assert not (folder / BROKEN).exists()
    before, again = bits(folder), encoder(folder, dataset=spoilt)
    assert (again.missing(skip_broken=True), again.missing()) == ([], [0, 1])
    with pytest.raises(EncodingError, match=r"images/3.jpg is no image"):
        again.run()
    (folder / BROKEN).unlink()
    assert bits(folder) == before
    spoilt.broken = ()
    assert again.run().skipped == ()
    encode(tmp_path / "whole", dataset=spoilt)
    assert bits(folder) == bits(tmp_path / "whole")


def test_latents_that_do_not_fit_the_dtype_stop_the_encoding(tmp_path):
    stage = autoencoder(tmp_path / "autoencoder")
    plain = stage.encode_raw
    stage.encode_raw = lambda images: plain(images)._replace(mean=plain(images).mean * 1e6)
    with pytest.raises(EncodingError, match=r"not finite in fp16; set encode.dtype=bf16"):
        encode(tmp_path / "latents", stage=stage)


def test_verifying_finds_a_changed_byte_and_a_nan(tmp_path):
    folder = tmp_path / "latents"
    encode(folder)
    check_shards(folder)
    shard = folder / "shards" / "00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"00001.safetensors was changed after it was written"):
        check_shards(folder)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_verifying_finds_statistics_of_other_latents(tmp_path, name):
    folder = tmp_path / "latents"
    manifest = encode(folder)
    write_manifest(folder, replace(manifest, **{name: tuple(1.001 * value for value in getattr(manifest, name))}))
    with pytest.raises(ValueError, match=f"the {name} per channel is .*; restore the manifest or delete it and run"):
        check_shards(folder)
    (folder / "manifest.json").unlink()
    assert encode(folder) == manifest


def test_pictures_stand_beside_the_originals_they_were_encoded_from(tmp_path, spoilt):
    folder = tmp_path / "latents"
    folder.mkdir()
    stage = autoencoder(tmp_path / "autoencoder")
    manifest = encoder(folder, stage=stage, dataset=spoilt, dtype="fp32").run(skip_broken=True)
    originals, decoded = reconstruct(folder, manifest, stage, spoilt.whole, 5)
    places = [int(i) for i in np.linspace(0, 46, 5).round()]
    left = [i for i in range(50) if i not in Spoilt.broken]
    images = spoilt.whole.__getitems__([left[place] for place in places])["images"]
    assert torch.equal(originals, images)
    assert (decoded.int() - stage.decode(stage.encode(images).mean).int()).abs().max() <= 1  # a rounding of batches


# ------------------------------------------------------------------------------------- processes that die or are many


def test_moving_the_images_does_not_begin_another_encoding(tmp_path):
    folder = tmp_path / "latents"
    encode(folder)
    record = json.loads((folder / "encoding.json").read_text())
    record["images"]["path"] = "elsewhere"
    (folder / "encoding.json").write_text(json.dumps(record))
    assert encoder(folder).missing() == []
    encoder(folder).run()


def test_until_the_first_shard_is_made_everything_may_change(tmp_path):
    folder = tmp_path / "latents"
    stage = autoencoder(tmp_path / "autoencoder")
    stage.encode_raw = out_of_memory
    with pytest.raises(EncodingError, match=r"encode.batch_size=32; lower it, or set first_stage.slicing=true"):
        encode(folder, stage=stage, batch_size=32)
    assert json.loads((folder / "encoding.json").read_text())["batch_size"] == 32
    encode(folder)
    assert json.loads((folder / "encoding.json").read_text())["batch_size"] == 8


def out_of_memory(images):
    raise torch.OutOfMemoryError


def test_what_cannot_change_the_latents_may_change_later(tmp_path):
    folder = tmp_path / "latents"
    stage = autoencoder(tmp_path / "autoencoder")
    encode(folder, stage=stage)
    sliced = Autoencoder(replace(stage.config, slicing=True))
    changed = encoder(folder, stage=sliced)
    changed.encoding["images"] |= {"path": "here", "id": "there", "min_side": 9, "max_megapixels": 1}
    changed.run()


def test_shards_that_are_on_another_disk_are_missed(tmp_path):
    folder = tmp_path / "latents"
    folder.mkdir()
    first = folder / "shards" / "00000.safetensors"
    with pytest.raises(EncodingError, match=r"00000.safetensors of the shards in .* do all nodes see the same disk"):
        encoder(folder).run(on_images=lambda count: first.unlink(missing_ok=True))
    with pytest.raises(NoLatents):
        read_manifest(folder)


def test_progress_counts_the_images_that_are_missing(tmp_path):
    encode(tmp_path / "latents")
    (tmp_path / "latents" / "shards" / "00002.safetensors").unlink()
    again, seen = encoder(tmp_path / "latents"), []
    assert again.shards.rows_in(again.missing()) == 10
    again.run(on_images=seen.append)
    assert sum(seen) == 10


def test_flips_are_the_encoders_not_the_images(tmp_path):
    images = replace(DIGITS)
    object.__setattr__(images, "flip", True)
    with pytest.raises(ValueError, match=r"images.flip=True: flips are encode.flips here"):
        EncodeConfig(images=images)


def test_latents_are_no_images_to_encode():
    with pytest.raises(ValueError, match=r"images.name=latents holds latents; name a data set of images"):
        EncodeConfig(images=DATASETS.config_class("latents")(path="latents"))
