"""The manifest of a folder of encoded latents: what they are, of what images, by which autoencoder, in which shards.

    data/imagenet256/
        manifest.json                 written last: a folder without it holds no latents yet; its last entry is the hash
                                      of its text without that entry
        encoding.json                 what is being encoded and how; an interrupted encoding goes on only with the same
        shards/00000.safetensors …    moments [n, F, M, C, H, W], labels [n], index [n]
        shards/00000.json …           written after its shard: hash, size and sums of it

F is 1, or 2 with the mirrored image second; M is 2, mean and std, or 1 from a deterministic autoencoder. Latents are
as the autoencoder makes them, before scale and shift. Rows follow the order of the images, and `index` is the place of
a row's image there.
"""

# n rows of a shard, F flips, M moments, C channels, H height, W width of latents

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from dit_moe.config import Tree
from dit_moe.files import read_sealed, require_size, write_sealed

FORMAT = 1
MANIFEST, SHARDS = "manifest.json", "shards"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class NoLatents(ValueError):
    """There are no finished latents in the folder."""


@dataclass(frozen=True)
class Shard:
    """One file of latents."""

    file: str
    count: int  # rows
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything that is known of encoded latents. `read_manifest` gets one that is whole."""

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # (C, H, W)
    latent_shape: tuple[int, int, int]
    moments: int  # M
    flips: bool
    dtype: str
    autoencoder: Tree  # the resolved section first_stage
    mean: tuple[float, ...]  # per channel, of sampled latents before scale and shift
    std: tuple[float, ...]
    encoding: Tree  # images, crop, precision, …: what an interrupted encoding must find again
    skipped: tuple[tuple[int, str], ...]  # broken images that were left out: place, reason
    shards: tuple[Shard, ...]

    def __len__(self) -> int:
        """Encoded images; with flips there are twice as many rows to train on."""
        return sum(shard.count for shard in self.shards)

    @property
    def downsampling(self) -> int:
        """Pixels of an image's side to one of its latents'."""
        return self.image_shape[1] // self.latent_shape[1]

    @property
    def fingerprint(self) -> str:
        """The same for the same latents with the same labels, wherever they lie."""
        content = [self.autoencoder["sha256"], self.class_names, [shard.sha256 for shard in self.shards]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def describe(self) -> str:
        """The latents in a few words."""
        shape = "×".join(map(str, self.latent_shape))
        flips = ", both ways round" if self.flips else ""
        return f"{len(self):,} latents {shape} in {self.dtype}{flips}, {len(self.class_names):,} classes"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the manifest in place, sealed by a hash of its text."""
    body = {"format": FORMAT, **asdict(manifest), "downsampling": manifest.downsampling}
    write_sealed(folder / MANIFEST, body)


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a folder whose shards are all there at their right sizes.

    Raises:
        NoLatents: there is none, or the encoding was not finished.
        ValueError: it was changed, is of another format, or a shard is missing or truncated.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        found = "holds an unfinished encoding" if (folder / SHARDS).is_dir() else "holds no encoded latents"
        raise NoLatents(f"{folder} {found}; run `dit-moe encode CONFIG`, or name another folder in data.path")
    body = read_sealed(path, FORMAT, "encode anew")
    manifest = Manifest(**{field.name: _frozen(body[field.name]) for field in fields(Manifest)} | _nested(body))
    for shard in manifest.shards:
        again = "run `dit-moe encode` again, which makes it anew"
        require_size(folder / SHARDS / shard.file, shard.bytes, MANIFEST, again)
    return manifest


def _nested(body: Tree) -> dict[str, Any]:
    return {
        "shards": tuple(Shard(**each) for each in body["shards"]),
        "autoencoder": body["autoencoder"],
        "encoding": body["encoding"],
    }


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
