"""Reading encoded latents."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save

from dit_moe.config import ConfigError
from dit_moe.data import DATASETS
from dit_moe.data.batch_sampler import BatchOrder, MicroBatches, load_batches
from dit_moe.data.latents import MOST_OPEN, LatentsConfig, NoLatents, read_manifest
from dit_moe.experiments.image import load_experiment
from tests.autoencoders.encoded import encode


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "latents"
    encode(folder)
    return folder


def read(folder, split="train", **options):
    return DATASETS.build(LatentsConfig(path=str(folder), **options), split)


def stored(folder):
    shards = [load_file(path) for path in sorted(folder.glob("shards/*.safetensors"))]
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


def test_every_row_is_the_stored_one_with_mirrored_images_behind(folder):
    dataset, whole = read(folder), stored(folder)
    assert len(dataset) == 100
    rows = dataset.__getitems__(range(100))
    assert torch.equal(rows["moments"], torch.cat([whole["moments"][:, 0], whole["moments"][:, 1]]))
    assert torch.equal(rows["labels"], whole["labels"].repeat(2))


def test_any_order_with_repeats_gives_the_same_rows(folder):
    dataset = read(folder)
    order = torch.randint(100, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    everything, batch = dataset.__getitems__(range(100)), dataset.__getitems__(order)
    assert torch.equal(batch["moments"], everything["moments"][order])
    assert torch.equal(batch["labels"], everything["labels"][order])


def test_without_flips_there_are_only_the_images_themselves(folder):
    assert len(read(folder, flip=False)) == 50


def test_the_heldout_split_is_another_folder_and_never_mirrored(folder):
    assert len(read("nowhere", split="heldout", heldout=str(folder))) == 50
    with pytest.raises(ValueError, match="heldout=None names no held-out latents"):
        read(folder, split="heldout")


def test_worker_processes_read_the_same(folder):
    dataset = read(folder)

    def batches(workers):
        parts = MicroBatches(BatchOrder(100, 16, seed=3), [range(16)], 2, 9)
        return [rows["moments"] for rows in load_batches(dataset, parts, workers)]

    assert all(torch.equal(a, b) for a, b in zip(batches(0), batches(2), strict=True))


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_every_dtype_is_read_as_stored(tmp_path, dtype):
    encode(tmp_path / "latents", dtype=dtype)
    rows = read(tmp_path / "latents").__getitems__(range(50))
    assert torch.equal(rows["moments"], stored(tmp_path / "latents")["moments"][:, 0])


def test_reading_is_by_memory_map_so_that_nothing_is_held(folder):
    dataset = read(folder)
    dataset.__getitems__(range(100))
    assert str(folder) in Path("/proc/self/maps").read_text()
    assert all(not isinstance(value, torch.Tensor) for value in vars(dataset).values())


def test_what_is_not_there_or_not_finished_is_named(tmp_path, folder):
    with pytest.raises(NoLatents, match="holds no encoded latents; run `dit-moe encode CONFIG`"):
        read(tmp_path / "nowhere")
    (tmp_path / "begun" / "shards").mkdir(parents=True)
    with pytest.raises(NoLatents, match="holds an unfinished encoding"):
        read(tmp_path / "begun")
    with pytest.raises(ValueError, match=r"no split 'test'; known: train, heldout"):
        read(folder, split="test")
    with pytest.raises(ConfigError, match=r"^path= is empty; say where the latents are"):
        read("")


def test_flips_that_were_not_encoded_are_refused(tmp_path):
    encode(tmp_path / "latents", flips=False)
    assert len(read(tmp_path / "latents")) == 50
    with pytest.raises(ValueError, match=r"flip=True, but .* encode.flips=false"):
        read(tmp_path / "latents", flip=True)


def test_a_truncated_or_missing_shard_is_named(tmp_path):
    encode(tmp_path / "latents")
    shard = tmp_path / "latents" / "shards" / "00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"00001.safetensors has \d+ bytes where manifest.json says \d+"):
        read(tmp_path / "latents")
    shard.unlink()
    with pytest.raises(ValueError, match=r"00001.safetensors is missing"):
        read(tmp_path / "latents")


@pytest.mark.parametrize(
    ("header", "changed", "message"),
    [
        (b'"BF16"', b'"F16" ', r"moments are F16 \[20, 2, 2, 4, 4, 4\] where manifest.json says BF16 \["),
        (b"[20,2,2,4,4,4]", b"[20,2,4,2,4,4]", r"moments are BF16 \[20, 2, 4, 2, 4, 4\] where manifest.json says BF16"),
        (b'"I64","shape":[20]', b'"I64","shape":[10]', r"labels are I64 \[10\] where manifest.json says I64 \[20\]"),
    ],
    ids=["dtype", "shape", "labels"],
)
def test_a_shard_of_another_dtype_or_shape_is_named(tmp_path, header, changed, message):
    encode(tmp_path / "latents", dtype="bf16")
    shard = tmp_path / "latents" / "shards" / "00001.safetensors"
    assert header in shard.read_bytes()
    shard.write_bytes(shard.read_bytes().replace(header, changed))
    dataset = read(tmp_path / "latents")
    dataset.__getitems__([0])
    with pytest.raises(ValueError, match=rf"00001.safetensors cannot be read \({message}.*restore it"):
        dataset.__getitems__([20])


def test_exchanged_shards_and_labels_that_no_class_has_are_named_with_their_row(tmp_path):
    encode(tmp_path / "latents")
    first, second = (tmp_path / "latents" / "shards" / f"{number:05d}.safetensors" for number in (0, 1))
    whole = first.read_bytes(), second.read_bytes()
    first.write_bytes(whole[1])
    second.write_bytes(whole[0])
    for call in (lambda data: data.class_counts(), lambda data: data.__getitems__([0])):
        with pytest.raises(ValueError, match=r"00000.safetensors cannot .* outside of 0 to 19: 20 in row 0; the"):
            call(read(tmp_path / "latents"))
    tensors = load(whole[0])
    tensors["labels"][7] = 99999
    first.write_bytes(save(tensors))
    with pytest.raises(ValueError, match=r"00000.safetensors .*labels outside of 0 to 9: 99999 in row 7; mani"):
        read(tmp_path / "latents").__getitems__([0])


@pytest.mark.parametrize("size", [256, 512])
def test_all_of_imagenet_is_in_fewer_files_than_are_kept_open(size):
    config = Path(__file__).parents[2] / "configs" / f"imagenet{size}" / "base.yaml"
    assert math.ceil(1_281_167 / load_experiment(config).encode.shard_size) <= 320 < MOST_OPEN


def test_a_manifest_edited_by_one_digit_is_refused(tmp_path):
    encode(tmp_path / "latents")
    path = tmp_path / "latents" / "manifest.json"
    text = path.read_text()
    for place in [i for i, character in enumerate(text) if character.isdigit()]:
        path.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
        with pytest.raises(ValueError, match=r"manifest.json (was changed|has format|is truncated)"):
            read_manifest(tmp_path / "latents")
    path.write_text(text.replace("\n", "\r\n"))
    with pytest.raises(ValueError, match=r"manifest.json was changed"):
        read_manifest(tmp_path / "latents")
    path.write_text(text)
    manifest = read_manifest(tmp_path / "latents")
    assert json.loads(text)["downsampling"] == manifest.downsampling == 4


def test_a_manifest_cut_short_or_of_another_format_is_refused(tmp_path):
    encode(tmp_path / "latents")
    path = tmp_path / "latents" / "manifest.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_manifest(tmp_path / "latents")
    path.write_text(json.dumps(json.loads(whole) | {"format": 2}))
    with pytest.raises(ValueError, match="has format 2, this version reads 1"):
        read_manifest(tmp_path / "latents")


def test_the_fingerprint_is_of_the_content_wherever_it_lies(tmp_path, folder):
    (tmp_path / "moved").symlink_to(folder)
    assert read(tmp_path / "moved").fingerprint == read(folder).fingerprint
    encode(tmp_path / "other", dtype="bf16")
    assert read(tmp_path / "other").fingerprint != read(folder).fingerprint
