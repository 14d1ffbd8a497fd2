"""Encoding: always the same bytes, however often stopped, and nothing half-written is read."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dit_moe.autoencoders.autoencoder import Autoencoder, AutoencoderConfig
from dit_moe.autoencoders.encode import check_shards, reconstruct
from dit_moe.autoencoders.encoder import BROKEN, EncodeConfig, EncodingError
from dit_moe.config import ConfigError
from dit_moe.data import DATASETS
from dit_moe.data.latents import NoLatents, read_manifest, write_manifest
from tests.autoencoders.encoded import DIGITS, WithBroken, autoencoder, encode, encoder
from tests.autoencoders.small import make
from tests.data.examples import class_files, write_tree
from tests.folders import contents


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Finished latents in fp32, with their autoencoder beside them."""
    folder = tmp_path_factory.mktemp("made") / "latents"
    encode(folder, dtype="fp32")
    return folder


@pytest.fixture
def stage(made):
    return Autoencoder(AutoencoderConfig(model=str(made.parent / "autoencoder")))


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the finished latents."""
    return shutil.copytree(made, tmp_path / "copy")


@pytest.fixture
def with_broken():
    return WithBroken(DATASETS.build(DIGITS, "train"), 50)


def shards_of(folder):
    return [load_file(path) for path in sorted(folder.glob("shards/*.safetensors"))]


def digits(rows):
    return DATASETS.build(DIGITS, "train").__getitems__(rows)


# ------------------------------------------------------------------------------------------------------ what is written


def test_shards_hold_the_moments_of_each_image_and_of_its_mirror(made, stage):
    rows, shards = digits(range(50)), shards_of(made)
    assert [len(shard["labels"]) for shard in shards] == [20, 20, 10]
    moments = torch.cat([shard["moments"] for shard in shards])
    for way, images in enumerate([rows["images"], rows["images"].flip(-1)]):
        wanted = stage.encode_raw(images)
        assert torch.allclose(moments[:, way, 0], wanted.mean, atol=1e-5)
        assert torch.allclose(moments[:, way, 1], wanted.std, atol=1e-5)
    assert torch.equal(torch.cat([shard["labels"] for shard in shards]), rows["labels"])
    assert torch.equal(torch.cat([shard["index"] for shard in shards]), torch.arange(50))


def test_the_manifest_says_what_the_latents_are(made, stage):
    manifest = read_manifest(made)
    assert (len(manifest), manifest.latent_shape, manifest.image_shape) == (50, (4, 4, 4), (1, 16, 16))
    assert (manifest.moments, manifest.flips, manifest.dtype) == (2, True, "fp32")
    assert manifest.class_names == tuple("0123456789")
    assert manifest.autoencoder["sha256"] == stage.resolved().sha256


def test_the_statistics_are_those_of_sampled_latents(made):
    manifest, moments = read_manifest(made), torch.cat([shard["moments"] for shard in shards_of(made)]).double()
    mean, std = moments[:, :, 0], moments[:, :, 1]
    draws = mean + std * torch.randn(400, *mean.shape, generator=torch.Generator().manual_seed(0))
    assert manifest.mean == pytest.approx(mean.mean((0, 1, 3, 4)).tolist(), abs=1e-12)
    assert manifest.std == pytest.approx(draws.std((0, 1, 2, 4, 5)).tolist(), rel=2e-3)  # 640 000 draws a channel


def test_a_deterministic_autoencoder_has_one_moment(tmp_path):
    model = make(tmp_path / "tiny", "AutoencoderTiny", in_channels=1, out_channels=1)
    stage = Autoencoder(AutoencoderConfig(model=model))
    manifest = encode(tmp_path / "latents", stage=stage, flips=False)
    assert (manifest.moments, manifest.flips) == (1, False)
    stored = shards_of(tmp_path / "latents")[0]["moments"][:8, 0]
    moments = stage.moments_of({"moments": stored})
    assert moments.std is None
    assert torch.allclose(moments.mean, stage.encode(digits(range(8))["images"]).mean, atol=2e-3)


# ------------------------------------------------------------------------------------------------------------- going on


def test_only_shards_that_are_lost_or_damaged_are_made_and_have_the_same_bytes(folder, made, stage):
    again, seen = encoder(folder, stage=stage, dtype="fp32"), []
    assert again.missing() == []
    (folder / "shards" / "00000.safetensors").unlink()
    (folder / "shards" / "00001.safetensors").write_bytes(b"short")
    assert again.missing() == [0, 1] and again.shards.rows_in([0, 1]) == 40
    again.run(on_images=seen.append)
    assert contents(folder) == contents(made) and sum(seen) == 40
    (folder / "shards" / "00002.json").unlink()
    again.run(on_images=seen.append)
    assert contents(folder) == contents(made) and sum(seen) == 50


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"dtype": "bf16"}, "encode.dtype"),
        ({"flips": False}, "encode.flips"),
        ({"shard_size": 30}, "encode.shard_size"),
        ({"seed": 1}, "encode.first_stage.sha256"),
    ],
)
def test_an_encoding_goes_on_only_as_it_was_begun(folder, tmp_path, stage, options, key):
    before = contents(folder)
    if "seed" in options:
        stage = autoencoder(tmp_path / "other", **options)
        options = {}
    with pytest.raises(ValueError, match=f"{key}=.* differs from the encoding in .*, which has"):
        encoder(folder, stage=stage, **{"dtype": "fp32"} | options).run()
    assert contents(folder) == before


def test_where_the_images_lie_and_what_cannot_change_the_latents_may_change(folder, stage):
    record = json.loads((folder / "encoding.json").read_text())
    record["images"]["path"] = "elsewhere"
    (folder / "encoding.json").write_text(json.dumps(record))
    changed = encoder(folder, stage=Autoencoder(replace(stage.config, slicing=True)), dtype="fp32")
    changed.encoding["images"] |= {"path": "here", "id": "there", "min_side": 9, "max_megapixels": 1}
    assert changed.missing() == []
    changed.run()


def test_until_the_first_shard_is_made_everything_may_change(tmp_path, stage):
    def out_of_memory(images):
        torch.empty(2**48)  # 1 PiB

    plain, stage.encode_raw = stage.encode_raw, out_of_memory
    with pytest.raises(EncodingError, match=r"^out of memory; lower encode.batch_size \(now 32\), or set"):
        encode(tmp_path, stage=stage, batch_size=32)
    assert json.loads((tmp_path / "encoding.json").read_text())["batch_size"] == 32
    stage.encode_raw = plain
    encode(tmp_path, stage=stage)
    assert json.loads((tmp_path / "encoding.json").read_text())["batch_size"] == 8


def test_latents_that_do_not_fit_the_dtype_stop_the_encoding(tmp_path, stage):
    plain = stage.encode_raw
    stage.encode_raw = lambda images: plain(images)._replace(mean=plain(images).mean * 1e6)
    with pytest.raises(EncodingError, match=r"not finite in fp16; set encode.dtype=bf16"):
        encode(tmp_path, stage=stage)


def test_shards_that_are_on_another_disk_are_missed(tmp_path, stage):
    first = tmp_path / "shards" / "00000.safetensors"
    with pytest.raises(EncodingError, match=r"00000.safetensors of the shards in .* do all nodes see the same disk"):
        encoder(tmp_path, stage=stage).run(on_images=lambda count: first.unlink(missing_ok=True))
    with pytest.raises(NoLatents):
        read_manifest(tmp_path)


# -------------------------------------------------------------------------------------------------------- broken images


def test_broken_images_stop_it_at_the_end_and_come_back_once_mended(tmp_path, stage, with_broken):
    folder = tmp_path / "latents"
    begun = encoder(folder, stage=stage, dataset=with_broken)
    with pytest.raises(EncodingError, match=r"images/3.jpg is no image and 2 more, listed in .*broken.json; mend them"):
        begun.run()
    assert [entry["index"] for entry in json.loads((folder / BROKEN).read_text())] == [3, 7, 25]
    assert begun.missing() == [0, 1]  # the third shard has none of them
    with pytest.raises(NoLatents):
        read_manifest(folder)
    begun.run(skip_broken=True)
    assert not (folder / BROKEN).exists()
    assert (begun.missing(skip_broken=True), begun.missing()) == ([], [0, 1])
    before = contents(folder)
    with pytest.raises(EncodingError, match=r"images/3.jpg is no image"):
        begun.run()
    (folder / BROKEN).unlink()
    assert contents(folder) == before
    with_broken.broken = ()
    assert begun.run().skipped == ()
    encode(tmp_path / "whole", stage=stage, dataset=with_broken)
    assert contents(folder) == contents(tmp_path / "whole")


def test_broken_images_are_left_out_on_demand_and_named_in_the_manifest(tmp_path, stage, with_broken):
    manifest = encoder(tmp_path, stage=stage, dataset=with_broken, dtype="fp32").run(skip_broken=True)
    assert len(manifest) == 47 and [shard.count for shard in manifest.shards] == [18, 19, 10]
    assert [i for i, _ in manifest.skipped] == [3, 7, 25]
    left = [i for i in range(50) if i not in WithBroken.broken]
    assert torch.cat([shard["index"] for shard in shards_of(tmp_path)]).tolist() == left
    check_shards(tmp_path)
    originals, decoded = reconstruct(tmp_path, manifest, stage, with_broken.whole, 5)
    places = [int(i) for i in np.linspace(0, 46, 5).round()]
    images = with_broken.whole.__getitems__([left[place] for place in places])["images"]
    assert torch.equal(originals, images)
    assert (decoded.int() - stage.decode(stage.encode(images).mean).int()).abs().max() <= 1  # a rounding of batches


def test_a_folder_goes_on_once_what_was_broken_in_it_is_mended_and_nothing_else_has_changed(tmp_path):
    files, stage = class_files(), Autoencoder(AutoencoderConfig(model=make(tmp_path / "autoencoder")))
    images = write_tree(tmp_path / "images", files | {"bee/002.png": b"no image"})
    config = DATASETS.config_class("image_folder")(path=str(images), heldout=0.4)

    def begun(split="train"):
        dataset, options = DATASETS.build(config, split), {"shard_size": 2, "images": config}
        return encoder(tmp_path / split, stage=stage, dataset=dataset, **options)

    begun("heldout").run()
    with pytest.raises(EncodingError, match="mend it in place and run the same command again"):
        begun().run()
    write_tree(images, {"bee/002.png": files["bee/002.png"]})
    first = tmp_path / "train" / "shards" / "00000.safetensors"
    before = first.stat().st_mtime_ns
    assert len(begun().run()) == len(begun().dataset) and first.stat().st_mtime_ns == before
    assert len(begun("heldout").run()) + len(begun().dataset) == len(files)
    write_tree(images, {"ant/001.png": files["ant/000.png"] + b"more"})
    with pytest.raises(ConfigError, match=r"encode.fingerprint=.* differs from the encoding in"):
        begun().run()


def test_a_shard_of_nothing_but_broken_images_is_empty_and_harmless(tmp_path, stage, with_broken):
    with_broken.broken = range(20, 40)
    assert len(encoder(tmp_path, stage=stage, dataset=with_broken).run(skip_broken=True)) == 30
    dataset = DATASETS.build(DATASETS.config_class("latents")(path=str(tmp_path)), "train")
    rows = digits([*range(20), *range(40, 50)])
    assert torch.equal(dataset.__getitems__(range(30))["labels"], rows["labels"])


# ------------------------------------------------------------------------------------------------ verifying, the config


def test_checking_finds_a_changed_byte(folder):
    check_shards(folder)
    shard = folder / "shards" / "00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"00001.safetensors was changed after it was written; delete"):
        check_shards(folder)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_checking_finds_statistics_of_other_latents(folder, name):
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, **{name: tuple(1.001 * value for value in getattr(manifest, name))}))
    with pytest.raises(ValueError, match=f"the {name} per channel is .*; restore the manifest or delete it and run"):
        check_shards(folder)


def test_a_config_names_images_and_leaves_flips_to_the_encoder():
    with pytest.raises(ValueError, match=r"images.name=latents holds latents; name a data set of images"):
        EncodeConfig(images=DATASETS.config_class("latents")(path="latents"))
    with pytest.raises(ValueError, match=r"images.flip=True: flips are encode.flips here"):
        EncodeConfig(images=DATASETS.config_class("image_folder")(path="images", flip=True))
