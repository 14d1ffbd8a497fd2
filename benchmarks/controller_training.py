"""The controller in real training: the digits model with other numbers of experts, targets and deliberately wrong p_0.

Trains configs/digits.yaml (shortened) for each case and prints one JSON line:
  reached     fraction of the training until the mean over 10 steps first comes within 2 % of the target
  worst       its largest distance from the target after the first tenth of the training, in %
  peak        the largest mean of a step, in targets
  mean, std   of the active experts per step over the last quarter
  error       |mean − target| / target in %

    python -m benchmarks.controller_training [--steps 600] [--cases 4,1.5 16,8 …] [--p0 0.05 solved] [--set key=value …]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from dit_moe.tasks.train import load, prepare, train
from dit_moe.training.log import read_log

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"
CASES = ["4,1.5", "4,2", "16,1.5", "16,2", "16,8", "64,1.5", "64,8"]


def measure(experts: int, target: float, p0: str, steps: int, overrides: list[str]) -> dict[str, float]:
    """Train one case and read its log; `p0` is a number, or "solved" on the first batch."""
    changes = [
        f"model.name=DiT-custom/2-{experts}E{target:g}A",
        f"model.moe.router.controller.p0={'null' if p0 == 'solved' else p0}",
        "model.moe.router.name=dtopp",
        "train.sample_every=null",
        f"train.checkpoint_every={steps}",
        f"train.warmup_steps={steps // 20}",
        f"train.steps={steps}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        experiment, dataset = prepare(load(CONFIG, [*changes, *overrides]))
        train(experiment, dataset, Path(folder))
        active = [line["active"] for line in read_log(Path(folder) / "log.jsonl")]
    smooth = [statistics.fmean(active[i - 9 : i + 1]) for i in range(9, len(active))]  # smooth[0] is after 10 steps
    away = [100 * abs(value - target) / target for value in smooth]
    last = active[3 * len(active) // 4 :]
    return {
        "reached": (next(i for i, value in enumerate(away) if value <= 2) + 10) / steps,
        "worst": max(away[max(0, steps // 10 - 9) :]),
        "peak": max(active) / target,
        "mean": statistics.fmean(last),
        "std": statistics.pstdev(last),
        "error": 100 * abs(statistics.fmean(last) - target) / target,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="EXPERTS,TARGET")
    parser.add_argument("--p0", nargs="+", default=["0.05", "0.95"], metavar="P0", help="numbers, or solved")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", dest="overrides")
    args = parser.parse_args()
    for case in args.cases:
        experts, target = case.split(",")
        for p0 in args.p0:
            result = measure(int(experts), float(target), p0, args.steps, args.overrides)
            start = p0 if p0 == "solved" else float(p0)
            rounded = {key: round(value, 4) for key, value in result.items()}
            print(json.dumps({"experts": int(experts), "target": float(target), "p0": start} | rounded), flush=True)


if __name__ == "__main__":
    main()
