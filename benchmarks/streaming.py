"""Memory and speed of writing samples: the sample command with a network and a decoder that cost next to nothing.

    python -m benchmarks.streaming [--images 50000] [--size 256] [--save npz,grid] [--out FOLDER]

Prints one JSON line: how many images, of which size, in which files, their bytes on disk, seconds, and the process's
largest resident memory in MiB, beside what it was before the first image. Then reads a few images back with numpy.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dit_moe import config
from dit_moe.autoencoders.base import to_uint8
from dit_moe.diffusion import OBJECTIVES
from dit_moe.experiments.image import Experiment, resolve_without_data
from dit_moe.experiments.run import ImageRun
from dit_moe.sampling.outputs import parse_outputs
from dit_moe.tasks.images import sample_images

LATENT = 8  # height and width of what is sampled; the decoder enlarges it


class Nothing(nn.Module):
    """A network whose velocity is zero, so that the latents are the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.weight * x


class Enlarge:
    """Latents [B, 3, 8, 8] → images of `size` pixels."""

    def __init__(self, size: int) -> None:
        self.factor = size // LATENT

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        small = to_uint8(latents_BCHW)
        return small.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)


def fake_run(images: int, size: int) -> ImageRun:
    """A run whose `sample` section asks for `images` images of `size`×`size` pixels."""
    tree = {
        "model": {"name": "DiT-S/2", "in_channels": 3, "input_size": LATENT, "num_classes": 1000},
        "objective": "flow",
        "data": "digits",
        "sample": {"count": images, "sampler": {"name": "euler", "steps": 1}},
    }
    experiment = resolve_without_data(config.build(Experiment, tree))
    objective = OBJECTIVES.build(experiment.objective, num_classes=1000)
    return ImageRun(Path("none"), 0, "none", experiment, Nothing(), objective, Enlarge(size), None, home=Path("none"))  # type: ignore[arg-type]


def resident(what: str) -> float:
    """MiB of this process by /proc: VmRSS now, VmHWM at most (getrusage would count the parent's before exec)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--save", default="npz,grid")
    parser.add_argument("--out", type=Path, help="default a temporary folder, deleted afterwards")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp())
    try:
        run, before, start = fake_run(args.images, args.size), resident("VmRSS"), time.perf_counter()
        sample_images(run, out, parse_outputs(args.save))
        facts = {
            "images": args.images,
            "size": args.size,
            "save": args.save,
            "bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
            "seconds": round(time.perf_counter() - start, 1),
            "peak_mib": round(resident("VmHWM")),
            "before_mib": round(before),
        }
        print(json.dumps(facts | (read_back(out / "images.npz") if "npz" in args.save else {})))
    finally:
        if args.out is None:
            shutil.rmtree(out)


def read_back(file: Path) -> dict[str, object]:
    """What numpy finds: the shape from the array's header alone, then the first and the last label and image."""
    with np.load(file) as arrays, arrays.zip.open("arr_0.npy") as entry:
        np.lib.format.read_magic(entry)
        shape, _, dtype = np.lib.format.read_array_header_1_0(entry)
        first = np.frombuffer(entry.read(int(np.prod(shape[1:]))), dtype)
        labels = arrays["labels"]
    return {"shape": shape, "dtype": str(dtype), "labels": len(labels), "first_mean": round(float(first.mean()), 2)}


if __name__ == "__main__":
    main()
