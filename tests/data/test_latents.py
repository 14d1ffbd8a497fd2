"""Reading encoded latents; what all data sets promise is in test_datasets.py."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save

from dit_moe.config import ConfigError
from dit_moe.data import DATASETS
from dit_moe.data.latents import MOST_OPEN, LatentsConfig, NoLatents, read_manifest
from dit_moe.experiments.image import load_experiment
from tests.autoencoders.encoded import encode


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of latents by dtype."""
    folder = tmp_path_factory.mktemp("latents")
    for dtype in ("fp16", "bf16", "fp32"):
        encode(folder / dtype, dtype=dtype)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy to damage, in bf16."""
    return shutil.copytree(made / "bf16", tmp_path / "copy")


def read(folder, split="train", **options):
    return DATASETS.build(LatentsConfig(path=str(folder), **options), split)


def shard_of(folder, number):
    return folder / "shards" / f"{number:05d}.safetensors"


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_every_row_is_the_stored_one_with_mirrored_images_behind(made, dtype):
    shards = [load_file(path) for path in sorted(made.glob(f"{dtype}/shards/*.safetensors"))]
    moments, labels = (torch.cat([shard[name] for shard in shards]) for name in ("moments", "labels"))
    dataset = read(made / dtype)
    rows = dataset.__getitems__(range(len(dataset)))
    assert len(dataset) == 100
    assert torch.equal(rows["moments"], torch.cat([moments[:, 0], moments[:, 1]]))
    assert torch.equal(rows["labels"], labels.repeat(2))


def test_mirrored_images_are_for_training_only_and_only_if_they_were_encoded(made, tmp_path):
    assert len(read(made / "fp16", flip=False)) == 50
    assert len(read("nowhere", split="heldout", heldout=str(made / "fp16"))) == 50
    encode(tmp_path / "latents", flips=False)
    assert len(read(tmp_path / "latents")) == 50
    with pytest.raises(ValueError, match=r"flip=True, but .* encode.flips=false"):
        read(tmp_path / "latents", flip=True)


def test_reading_is_by_memory_map_so_that_nothing_is_held(made):
    dataset = read(made / "fp16")
    dataset.__getitems__(range(100))
    assert str(made / "fp16") in Path("/proc/self/maps").read_text()
    assert all(not isinstance(value, torch.Tensor) for value in vars(dataset).values())


@pytest.mark.parametrize("size", [256, 512])
def test_all_of_imagenet_is_in_fewer_files_than_are_kept_open(size):
    config = Path(__file__).parents[2] / "configs" / f"imagenet{size}" / "base.yaml"
    assert math.ceil(1_281_167 / load_experiment(config).encode.shard_size) <= 320 < MOST_OPEN


def test_other_latents_have_another_fingerprint(made):
    assert read(made / "bf16").fingerprint != read(made / "fp16").fingerprint


# --------------------------------------------------------------------------------------------------- what is refused


def test_what_is_not_there_or_not_finished_is_named(tmp_path, made):
    with pytest.raises(NoLatents, match="holds no encoded latents; run `dit-moe encode CONFIG`"):
        read(tmp_path / "nowhere")
    (tmp_path / "begun" / "shards").mkdir(parents=True)
    with pytest.raises(NoLatents, match="holds an unfinished encoding"):
        read(tmp_path / "begun")
    with pytest.raises(ConfigError, match=r"^path= is empty; say where the latents are"):
        read("")
    with pytest.raises(ConfigError, match=r"^heldout=None names no held-out latents; say where they are"):
        read(made / "fp16", split="heldout")


def test_a_truncated_or_missing_shard_is_named(folder):
    shard = shard_of(folder, 1)
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"00001.safetensors has \d+ bytes where manifest.json says \d+"):
        read(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=r"00001.safetensors is missing"):
        read(folder)


@pytest.mark.parametrize(
    ("header", "changed", "message"),
    [
        (b'"BF16"', b'"F16" ', r"moments are F16 \[20, 2, 2, 4, 4, 4\] where manifest.json says BF16 \["),
        (b"[20,2,2,4,4,4]", b"[20,2,4,2,4,4]", r"moments are BF16 \[20, 2, 4, 2, 4, 4\] where manifest.json says BF16"),
        (b'"I64","shape":[20]', b'"I64","shape":[10]', r"labels are I64 \[10\] where manifest.json says I64 \[20\]"),
    ],
    ids=["dtype", "shape", "labels"],
)
def test_a_shard_of_another_dtype_or_shape_is_named(folder, header, changed, message):
    shard = shard_of(folder, 1)
    assert header in shard.read_bytes()
    shard.write_bytes(shard.read_bytes().replace(header, changed))
    dataset = read(folder)
    dataset.__getitems__([0])
    with pytest.raises(ValueError, match=rf"00001.safetensors cannot be read \({message}.*restore it"):
        dataset.__getitems__([20])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            lambda content: (10**13).to_bytes(8, "little") + content[8:],
            "its header is said to have 10,000,000,000,000 by",
        ),
        (lambda content: (2**16).to_bytes(8, "little") + b"[" * (len(content) - 8), "more than 100 levels"),
        (lambda content: content.replace(b'"data_offsets":[', b'"data_offsets":[9', 1), ""),
        (lambda content: content.replace(b'"labels"', b'"a\\u006e3"'), "labels is missing"),
        (lambda content: b"<!DOCTYPE html>".ljust(len(content)), "its header is said"),
    ],
    ids=["length", "deep", "offsets", "missing", "web page"],
)
def test_a_shard_whose_header_lies_is_named(folder, changed, message):
    shard = shard_of(folder, 1)
    content = shard.read_bytes()
    shard.write_bytes(changed(content)[: len(content)])
    for call in (lambda data: data.class_counts(), lambda data: data.__getitems__([20])):
        with pytest.raises(ValueError, match=rf"00001.safetensors cannot be read \(.*{message}.*restore it") as error:
            call(read(folder))
        assert "\n" not in str(error.value)


def test_exchanged_shards_and_labels_that_no_class_has_are_named_with_their_row(folder):
    first, second = shard_of(folder, 0), shard_of(folder, 1)
    whole = first.read_bytes(), second.read_bytes()
    first.write_bytes(whole[1])
    second.write_bytes(whole[0])
    for call in (lambda data: data.class_counts(), lambda data: data.__getitems__([0])):
        with pytest.raises(ValueError, match=r"00000.safetensors cannot .* outside of 0 to 19: 20 in row 0; the"):
            call(read(folder))
    tensors = load(whole[0])
    tensors["labels"][7] = 99999
    first.write_bytes(save(tensors))
    with pytest.raises(ValueError, match=r"00000.safetensors .*labels outside of 0 to 9: 99999 in row 7; mani"):
        read(folder).__getitems__([0])


def test_a_manifest_that_was_edited_or_cut_short_is_refused(folder):
    path, text = folder / "manifest.json", (folder / "manifest.json").read_text()
    assert json.loads(text)["downsampling"] == 4
    digits = [i for i, character in enumerate(text) if character.isdigit()]
    edited = [text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1 :] for i in [*digits[::20], digits[-1]]]
    for content in (*edited, text.replace("\n", "\r\n"), text[: len(text) // 2]):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"manifest.json (was changed|has format|is truncated)"):
            read_manifest(folder)
    path.write_text(json.dumps(json.loads(text) | {"format": 2}))
    with pytest.raises(ValueError, match="has format 2, this version reads 1"):
        read_manifest(folder)
