"""How far DiffMoE's own evaluation is from ours, which compares every token with the thresholds by itself.

Its own takes for each expert as many of the batch's tokens as exceed its threshold, but those that score best, so that
an image depends on the others. Trains configs/routers/diffmoe.yaml (shortened), evaluates held-out digits by both rules
in the same batches, at the same noise, and prints one JSON line for each size of a batch:
  difference  of the outputs, as a share of ours (norms)
  moved       pairs of token and expert that only the original has, as a share of all
  loss, own   held-out losses by ours and by the original

    python -m benchmarks.diffmoe_evaluation [--steps 600] [--images 8 64] [--set key=value …]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from dit_moe.evaluation.heldout_loss import HeldoutConfig
from dit_moe.experiments.run import ImageRun, open_image_run
from dit_moe.moe.routers.base import Choice, Scores
from dit_moe.moe.routers.diffmoe import DiffMoERouter
from dit_moe.tasks.images import heldout_loss
from dit_moe.tasks.train import load, prepare, train

CONFIG = Path(__file__).parent.parent / "configs" / "routers" / "diffmoe.yaml"


def measure(run: ImageRun, images: int) -> dict[str, float]:
    """Both rules on held-out images in batches of so many."""
    outputs: list[torch.Tensor] = []
    moved, pairs = 0, 0
    ours = DiffMoERouter.route

    def by_batch(router: DiffMoERouter, scores: Scores) -> Choice:
        nonlocal moved, pairs
        choice = ours(router, scores)
        rank_NE = scores.score_NE.argsort(0, descending=True).argsort(0)
        mask_NE = rank_NE < choice.mask_NE.sum(0)
        moved, pairs = moved + int((mask_NE & ~choice.mask_NE).sum()), pairs + int(mask_NE.sum())
        return replace(choice, mask_NE=mask_NE, gate_NE=router.gates(scores.score_NE, mask_NE))

    hook = run.model.register_forward_hook(lambda *called: outputs.append(called[-1]))
    settings = HeldoutConfig(draws=2, batch_size=images)
    loss = heldout_loss(run, settings).loss
    with patch.object(DiffMoERouter, "route", by_batch):
        own = heldout_loss(run, settings).loss
    hook.remove()
    here, there = (torch.cat(half) for half in (outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :]))
    return {
        "difference": ((there - here).norm() / here.norm()).item(),
        "moved": moved / pairs,
        "loss": loss,
        "own": own,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--images", nargs="+", type=int, default=[64], help="images of a batch")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", dest="overrides")
    args = parser.parse_args()
    changes = ["train.sample_every=null", f"train.checkpoint_every={args.steps}", f"train.steps={args.steps}"]
    with tempfile.TemporaryDirectory() as folder:
        experiment, dataset = prepare(load(CONFIG, [*changes, *args.overrides]))
        train(experiment, dataset, Path(folder))
        run = open_image_run(folder)
        for images in args.images:
            rounded = {key: round(value, 5) for key, value in measure(run, images).items()}
            print(json.dumps({"steps": args.steps, "images": images} | rounded), flush=True)


if __name__ == "__main__":
    main()
