"""How fast training data is read: latents from shards, against one .npy file a latent and decoding JPEGs at every step.

    python -m benchmarks.reading [FOLDER] [--images 1281167] [--files 2000] [--batches 390]

Makes a manifest of so many latents (4×32×32, fp16, both ways round, as of ImageNet at 256 pixels) over sparse shards in
FOLDER, which take no disk, reads so many shuffled batches of 256 and prints one JSON line per way of reading: the two
others, of so many files each, with a fifth and a hundredth of the batches.
`anonymous_MiB` is the memory that reading has added to the process, without what is mapped from files, which all
processes share and the system may drop.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dit_moe.data import DATASETS
from dit_moe.data.batch_sampler import GlobalBatches
from dit_moe.data.latents import SHARDS, LatentsConfig, Manifest, Shard, write_manifest

SHARD, BATCH = 4096, 256
ROW = (2, 2, 4, 32, 32)  # flips, moments, channels, height, width


def sparse_latents(folder: Path, images: int) -> None:
    """Shards of zeros that are holes in their files, but for the places of their images, and a manifest of them."""
    (folder / SHARDS).mkdir(parents=True)
    shards = []
    for number, start in enumerate(range(0, images, SHARD)):
        count = min(SHARD, images - start)
        sizes = {"index": ("I64", [count]), "labels": ("I64", [count]), "moments": ("F16", [count, *ROW])}
        header, end = {}, 0
        for name, (dtype, shape) in sizes.items():
            begin, end = end, end + int(np.prod(shape)) * (8 if dtype == "I64" else 2)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path = folder / SHARDS / f"{number:05d}.safetensors"
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text + np.arange(start, start + count).tobytes())
            file.truncate(8 + len(text) + end)
        shards.append(Shard(path.name, count, path.stat().st_size, "0" * 64))
    manifest = Manifest(
        class_names=tuple(map(str, range(1000))),
        image_shape=(3, 256, 256),
        latent_shape=(4, 32, 32),
        moments=2,
        flips=True,
        dtype="fp16",
        autoencoder={"sha256": "0" * 64},
        mean=(0.0,) * 4,
        std=(1.0,) * 4,
        encoding={"shard_size": SHARD},
        skipped=(),
        shards=tuple(shards),
    )
    write_manifest(folder, manifest)


def anonymous_mib() -> float:
    """Memory of this process that no file stands behind."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


def measure(name: str, read: Callable[[list[int]], object], size: int, batches: int) -> None:
    order, before = GlobalBatches(size, BATCH, seed=0), anonymous_mib()
    order.batch(0)  # the epoch's permutation
    read(order.batch(0))
    held = anonymous_mib()
    start = time.perf_counter()
    for step in range(batches):
        read(order.batch(step))
    seconds = time.perf_counter() - start
    facts = {
        "reading": name,
        "rows_of": size,
        "rows_per_s": round(batches * BATCH / seconds),
        "anonymous_MiB": round(anonymous_mib() - before, 1),
        "grown_while_reading_MiB": round(anonymous_mib() - held, 1),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(facts), flush=True)


def measure_all(folder: Path, images: int, files: int, batches: int) -> None:
    sparse_latents(folder / "latents", images)
    start = time.perf_counter()
    latents = DATASETS.build(LatentsConfig(path=str(folder / "latents")), "train")
    print(json.dumps({"opening": "latents", "images": images, "seconds": round(time.perf_counter() - start, 3)}))
    measure("latents from shards", latents.__getitems__, len(latents), batches)

    moments = np.zeros(ROW[1:], np.float16)
    chance = np.random.default_rng(0)
    (folder / "npy").mkdir()
    (folder / "jpeg" / "0").mkdir(parents=True)
    photo = Image.fromarray(chance.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize(
        (500, 375), Image.Resampling.BICUBIC
    )
    for i in range(files):
        np.save(folder / "npy" / f"{i}.npy", moments)
        photo.save(folder / "jpeg" / "0" / f"{i:05d}.jpg", quality=90)
    npy = [folder / "npy" / f"{i}.npy" for i in range(files)]
    measure("one np.load a latent", lambda rows: np.stack([np.load(npy[i]) for i in rows]), files, max(batches // 5, 1))
    jpegs = DATASETS.build(DATASETS.config_class("image_folder")(path=str(folder / "jpeg"), size=256), "train")
    measure("JPEGs 500×375, cropped to 256", jpegs.__getitems__, files, max(batches // 100, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="default a temporary one, deleted afterwards")
    parser.add_argument("--images", type=int, default=1_281_167, help="latents in the shards")
    parser.add_argument("--files", type=int, default=2_000, help="files of each of the other ways")
    parser.add_argument("--batches", type=int, default=390, help="batches of 256 read from the shards")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure_all(args.folder or Path(temporary), args.images, args.files, args.batches)


if __name__ == "__main__":
    main()
