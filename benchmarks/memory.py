"""The memory that a training step takes at most, with and without experts.

    python -m benchmarks.memory [--models DiT-S/2,DiT-S/2-64E8A] [--batch 8] [--router dtopp] [--dtypes fp32,bf16]

Each model trains three steps in a process of its own, and prints a JSON line: the highest resident memory of that
process, or of a GPU's what torch had allocated at most, of it the weights with gradients, moments and average
(`state_MiB`), and the whole against the first model's (`times_baseline`).
"""

from __future__ import annotations

import argparse
import multiprocessing
from typing import Any

from benchmarks._timing import show
from benchmarks.train_step import build

STEPS, COPIES = 3, 5  # weights, gradient, two moments, average


def measure(name: str, router: str, batch: int, dtype: str, results: Any) -> None:
    from dit_moe.training.devices import peak_memory

    step, call = build(name, router, batch, dtype, compiled=False)
    for _ in range(STEPS):
        call()
    weights = sum(parameter.nbytes for parameter in step.model.parameters())
    results.put((peak_memory() / 2**20, COPIES * weights / 2**20, str(step.accelerator.device)))


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="DiT-S/2,DiT-S/2-64E8A")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--router", default="dtopp")
    parser.add_argument("--dtypes", default="fp32,bf16")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for dtype in args.dtypes.split(","):
        baseline = None
        for name in args.models.split(","):
            results = context.Queue()
            process = context.Process(target=measure, args=(name, args.router, args.batch, dtype, results))
            process.start()
            peak, state, device = results.get()
            process.join()
            baseline = baseline or peak
            facts = {"peak_MiB": round(peak), "state_MiB": round(state), "times_baseline": peak / baseline}
            show("memory", torch.device(device), model=name, batch=args.batch, router=args.router, dtype=dtype, **facts)


if __name__ == "__main__":
    main()
