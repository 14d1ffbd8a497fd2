"""Made-up results of a study, with the shapes that real ones have."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_moe.studies.jobs import Job, Share
from dit_moe.studies.results import RunResults, StudyResults, VariantResults
from tests.cli.conftest import CONFIG, SMALL, cli

FLOPS = 9.2e6  # of a forward pass without routed experts, and of each active expert
EXPERT = 1.1e6
#     name, label, objective, router, controlled, experts, target, held-out active, loss, seconds per step
Row = tuple[str, str, str, str | None, bool, int | None, float | None, float | None, float, float]
ROWS: list[Row] = [
    ("dense", "dense", "flow", None, False, None, None, None, 0.3779, 0.112),
    ("topk", "top-k", "flow", "topk", False, 8, 2.0, 2.0, 0.3774, 0.139),
    ("topp-0.5", "top-p 0.5", "flow", "topp", False, 8, 2.0, 1.02, 0.3765, 0.108),
    ("topp-0.7", "top-p 0.7", "flow", "topp", False, 8, 2.0, 1.45, 0.3760, 0.118),
    ("topp-0.9", "top-p 0.9", "flow", "topp", False, 8, 2.0, 2.9, 0.3752, 0.149),
    ("dtopp", "DTop-p", "flow", "dtopp", True, 8, 2.0, 2.003, 0.3755, 0.148),
    ("dtopp-layerwise", "DTop-p layer-wise", "flow", "dtopp", True, 8, 2.0, 1.996, 0.3759, 0.149),
    ("dtopp-no-drn", "DTop-p without DRN", "flow", "dtopp", True, 8, 2.0, 2.005, 0.3763, 0.147),
    ("dtopp-no-pi", "DTop-p without PI", "flow", "dtopp", False, 8, 2.0, 1.36, 0.3761, 0.126),
    ("topk-16E4A", "top-k 16E4A", "flow", "topk", False, 16, 4.0, 4.0, 0.3766, 0.171),
    ("dtopp-16E4A", "DTop-p 16E4A", "flow", "dtopp", True, 16, 4.0, 4.01, 0.3741, 0.182),
    ("topk-ddpm", "top-k", "ddpm", "topk", False, 8, 2.0, 2.0, 0.1512, 0.141),
    ("dtopp-ddpm", "DTop-p", "ddpm", "dtopp", True, 8, 2.0, 1.997, 0.1507, 0.150),
]
MADE = {
    "machine": {"cpu": "AMD EPYC 9R14", "cores": 2, "gpu": None},
    "versions": {"dit_moe": "0.1.0", "torch": "2.14.1"},
    "threads": 1,
    "precision": "fp32",
}
BASELINES = {
    "dtopp-16E4A": "topk-16E4A",
    "topk-16E4A": "topk-16E4A",
    "dtopp-ddpm": "topk-ddpm",
    "topk-ddpm": "topk-ddpm",
}


def write_small_study(folder: Path) -> Path:
    """The file of a study of two runs that each take seconds."""
    changes = json.dumps([*SMALL, "eval.seeds=1", "train.log_every=1"])
    (folder / "small.yaml").write_text(
        f"title: A small study\nconfig: {CONFIG}\nbaseline: topk\nseeds: [0]\nchanges: {changes}\n"
        "variants: [{name: topk, label: top-k, changes: [model.moe.router=topk]}, {name: dtopp, label: DTop-p}]\n"
        "metric: fd_digits_cnn64.ratio\nheldout: {draws: 1}\ntiming_steps: 1\n"
    )
    return folder / "small.yaml"


def run_here(jobs: Sequence[Job], share: Share) -> list[Job]:
    """In place of `run_jobs`, in this process, where no imports are waited for."""
    for job in jobs:
        job.returncode = cli(*job.command[3:])
    return [job for job in jobs if job.returncode]


def results(names: list[str] | None = None, seeds: int = 3, layers: int = 4, **changes: Any) -> StudyResults:
    """Of the variants `names` (None: all 13); `changes` replace entries of the whole."""
    random = np.random.default_rng(0)
    shared = random.normal(0, 6e-4, seeds)  # what the seeds do to all variants alike
    rows = [row for row in ROWS if names is None or row[0] in names]
    there = {row[0] for row in rows}
    variants = [_variant(row, seeds, layers, shared, random) for row in rows]
    for each in variants:
        wanted = BASELINES.get(each.name, "topk")
        each.baseline = wanted if wanted in there else each.name
    made: dict[str, Any] = {
        "study": "digits",
        "title": "Routers on handwritten digits",
        "finished": True,
        "missing": [],
        "unit": "image",
        "loss": {"label": "held-out loss", "unit": ""},
        "metric": {"name": "fd_digits_cnn64.ratio", "label": "Fréchet distance / floor", "better": "lower"},
        "settings": {"heldout": {"draws": 8, "batch_size": 256}, "seeds": list(range(seeds))},
        "timing": {"made": MADE | {"threads": 2}, "steps": 5},
        "variants": variants,
        "steps": [600],
        **changes,
    }
    return StudyResults(**made)


def _variant(row: Row, seeds: int, layers: int, shared: np.ndarray, random: np.random.Generator) -> VariantResults:
    name, label, objective, router, controlled, experts, target, _, _, seconds = row
    return VariantResults(
        name=name,
        label=label,
        baseline=name,
        model="DiT-custom",
        objective=objective,
        experts=experts,
        target=target,
        router=router,
        controlled=controlled,
        seconds_per_step=seconds,
        parameters=1_200_000 if experts else 460_000,
        active_parameters=460_000.0,
        runs=[_run(row, seed, layers, shared[seed], random) for seed in range(seeds)],
    )


def _run(row: Row, seed: int, layers: int, shared: float, random: np.random.Generator) -> RunResults:
    name, _, _, router, controlled, _, target, active, loss, _ = row
    if active is not None and router != "topk":
        active *= 1 + random.normal(0, 0.002 if controlled else 0.02)
    steps = np.arange(5, 601, 5)
    curve = spread = p = by_layer = None
    if active is not None:
        start = target if controlled else active + 0.9
        noise = 0 if router == "topk" else 0.005 * target
        middle = active + (start - active) * np.exp(-steps / 60) if router != "topk" else np.full(len(steps), active)
        curve = (middle + random.normal(0, noise, len(steps))).tolist()
        spread = np.full(len(steps), noise).tolist()
        tilt = 0 if router == "topk" else 0.35
        by_layer = [active * (1 + tilt * math.sin(2.1 * i) * (0.2 if "layer" in name else 1)) for i in range(layers)]
    if name == "dtopp-no-pi":
        p = [0.51 + 0.002 * seed] * len(steps)
    elif controlled:
        p = (0.84 - 0.34 * np.exp(-steps / 90) + random.normal(0, 0.003, len(steps)) - 0.03 * (target - 2)).tolist()
    return RunResults(
        seed=seed,
        folder=f"runs/compare-digits/{name}-s{seed}",
        step=600,
        loss=loss + shared + random.normal(0, 1.2e-4),
        metric=1.5 + (60 * (loss - 0.3741) if loss > 0.2 else 0.4) + random.normal(0, 0.03),
        active=active,
        active_layers=by_layer,
        training_active=None if active is None else {"target": target, "mean": active, "std": noise},
        balance=None if active is None else 1.1,
        memory=600 * 2**20,
        flops=FLOPS + EXPERT * 2 if active is None else FLOPS + EXPERT * 2 / target * active,
        made=MADE,
        curves={
            "step": steps.tolist(),
            "loss": (loss + 1.3 * np.exp(-steps / 40) + random.normal(0, 0.004, len(steps))).tolist(),
            "active": curve,
            "active_std": spread,
            "p": p,
        },
    )
