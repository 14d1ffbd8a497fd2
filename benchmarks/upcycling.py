"""Is a model with experts better begun from a dense one than from zero, and does it beat the dense one that goes on?

For each seed trains the model of --config without its experts for a while, then goes on for as many added steps with
each of: the dense model; models with experts that were upcycled from it by each method; and the same models from zero.
Prints one JSON line for each: the held-out loss before the added steps, where there is one, and after. Copies are twice
as wide, so that one of 8 is active and not two, and are compared with that model.

    python -m benchmarks.upcycling [--config configs/digits.yaml] [--steps 300] [--added 200] [--seeds 1 2 3]
        [--set key=value …]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_moe.evaluation.heldout_loss import HeldoutConfig
from dit_moe.tasks import images
from dit_moe.tasks.train import load, prepare, train
from dit_moe.tasks.upcycle import UpcycleOptions, upcycle

DIGITS = Path(__file__).parent.parent / "configs" / "digits.yaml"
SPLIT, COPY = "8E2A", "8E1A"  # the same active width
WIDE = "model.moe.granularity=1"
METHODS = {"split": SPLIT, "cluster": SPLIT, "copy": COPY}
HELDOUT = HeldoutConfig(images=1000)


def changes(steps: int, seed: int, more: Sequence[str]) -> list[str]:
    """To a config, so that it is trained for so many steps."""
    schedule = [f"train.steps={steps}", f"train.warmup_steps={steps // 10}", f"train.checkpoint_every={steps}"]
    return [*schedule, "train.sample_every=null", "train.lr=2e-3", "train.ema_decay=0.98", f"seed={seed}", *more]


def trained(config: Path, folder: Path, overrides: Sequence[str]) -> float:
    """The held-out loss of a run that is trained in `folder`."""
    experiment, dataset = prepare(load(config, overrides))
    train(experiment, dataset, folder)
    return images.heldout_loss(images.open_run(folder), HELDOUT).loss


def measure(config: Path, seed: int, steps: int, added: int, more: Sequence[str], folder: Path) -> None:
    """All of one seed."""
    base, dense = folder / "base", str(load(config, more).model.name).rpartition("-")[0]
    first, then = changes(steps, seed, more), changes(added, seed, more)
    without = f"model.name={dense}"
    before = trained(config, base, [*first, without])
    report(seed, "dense", before, trained(config, folder / "dense", [*then, without, f"train.init_from={base}"]))
    for method, experts in METHODS.items():
        start = folder / f"start-{method}"
        options = UpcycleOptions(name=f"{dense}-{experts}", router="dtopp", method=method)
        found = upcycle(base, options, [], start)
        after = trained(start / "config.yaml", folder / method, [*then, f"train.init_from={start}"])
        report(seed, method, found["heldout_loss"], after)
    for experts in dict.fromkeys(METHODS.values()):
        shape = [f"model.name={dense}-{experts}", "model.moe.bias=true", *([WIDE] if experts == COPY else [])]
        report(seed, f"{experts} from zero", None, trained(config, folder / experts, [*then, *shape]))


def report(seed: int, start: str, before: float | None, after: float) -> None:
    line: dict[str, Any] = {"seed": seed, "model": start, "loss_before": before, "loss_after": round(after, 5)}
    print(json.dumps(line | {"loss_before": before and round(before, 5)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DIGITS, help="a config with experts")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--added", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="key=value", dest="overrides", help="changes to all configs"
    )
    args = parser.parse_args()
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            measure(args.config, seed, args.steps, args.added, args.overrides, Path(folder))


if __name__ == "__main__":
    main()
