"""What several trainings at once get done on one machine, against one alone.

    python -m benchmarks.side_by_side [--config configs/digits.yaml] [--jobs 2] [--steps 300] [--set key=value …]

Trains the config once alone and then --jobs times at once, each by the command and with as many threads as it takes by
itself. Prints one JSON line: images (or tokens) per second of the one, of each of the others, and their sum divided by
that of the one. A speed is the median over a run's steps but the first quarter.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks._timing import show
from dit_moe.training.log import read_log

DIGITS = Path(__file__).parent.parent / "configs" / "digits.yaml"


def speeds(config: Path, overrides: Sequence[str], folders: Sequence[Path]) -> list[float]:
    """Of trainings that are started together, one into each folder."""
    command = [sys.executable, "-m", "dit_moe.cli", "train", str(config), *overrides]
    started = [
        subprocess.Popen([*command, "--run", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for folder in folders
    ]
    for process, folder in zip(started, folders, strict=True):
        if process.wait():
            raise SystemExit(f"{folder.name} ended with {process.returncode}; run {' '.join(command)} to see why")
    return [speed(folder) for folder in folders]


def speed(run: Path) -> float:
    log = read_log(run / "log.jsonl")
    name = next(name for name in ("images_per_s", "tokens_per_s") if name in log[-1])
    return statistics.median(line[name] for line in log[len(log) // 4 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DIGITS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="key=value", dest="overrides", help="changes to the config"
    )
    args = parser.parse_args()
    overrides = [f"train.steps={args.steps}", "train.log_every=1", "train.sample_every=null", *args.overrides]
    with tempfile.TemporaryDirectory() as made:
        alone = speeds(args.config, overrides, [Path(made) / "alone"])[0]
        together = speeds(args.config, overrides, [Path(made) / f"job-{job}" for job in range(args.jobs)])
    show(
        "side_by_side",
        torch.device("cpu"),
        config=args.config.stem,
        jobs=args.jobs,
        cores=os.cpu_count(),
        per_second_alone=alone,
        per_second_each=[round(each, 1) for each in together],
        together_by_alone=sum(together) / alone,
    )


if __name__ == "__main__":
    main()
