"""A run small enough for tests: a DTop-p DiT of 2 blocks on the digits.

As a script, ``tiny_run.py RUN DEATH``, it dies of kill -9: after step N for the DEATH ``step:N``, and for ``FILE:N``
when FILE of the Nth checkpoint is being put on the disk.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from dit_moe import checkpoint, config
from dit_moe.data import DATASETS
from dit_moe.diffusion import OBJECTIVES
from dit_moe.models import MODELS
from dit_moe.moe import MoEConfig
from dit_moe.moe.control import ControllerConfig
from dit_moe.moe.routers.dtopp import DTopPConfig
from dit_moe.training import Hook, TrainConfig, Trainer, open_start

SEED = 5
DIGITS = tuple("0123456789")
DEFAULTS = {"steps": 20, "batch_size": 32, "lr": 1e-3, "log_every": 5, "checkpoint_every": 10}
LONG = {"steps": 50, "log_every": 1, "grad_clip": 0.3}
OTHER_CLASSES = ("9", *"abcdefgh", "0", "1")


class Recorded:
    """A data set that remembers which rows were asked for."""

    def __init__(self, dataset):
        self.dataset, self.asked = dataset, []

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, indices):
        self.asked.append(list(indices))
        return self.dataset.__getitems__(indices)


def to_latents(raw, random):
    """Pixels in [-1, 1] with a little noise, so that a wrong stream of random numbers shows."""
    images = raw["images"].float() / 127.5 - 1
    return {"latents": images + 0.01 * random.normal(*images.shape[1:]), "labels": raw["labels"]}


def build(
    run,
    *,
    prepare_batch=to_latents,
    objective=None,
    hooks=(),
    classes=DIGITS,
    p0=None,
    width=32,
    recompute=False,
    **train,
) -> Trainer:
    """A trainer with `train` over DEFAULTS; the same weights every time. With `p0` nothing is solved at the start."""
    train_config = TrainConfig(**(DEFAULTS | train))
    moe = MoEConfig(router=DTopPConfig(controller=ControllerConfig(p0=p0)))
    shape = {"width": width, "depth": 2, "heads": 2, "in_channels": 1, "input_size": 8, "num_classes": len(classes)}
    model_config = MODELS.config_class("DiT")(name="DiT-custom/2-4E2A", moe=moe, recompute=recompute, **shape)
    sections = {"train": config.dump(train_config), "model": config.dump(model_config), "seed": SEED}
    torch.manual_seed(0)
    return Trainer(
        train_config,
        model=MODELS.build(model_config),
        objective=objective or OBJECTIVES.build(OBJECTIVES.config_class("flow")(), num_classes=len(classes)),
        dataset=Recorded(DATASETS.build(DATASETS.config_class("digits")(), "train")),
        prepare_batch=prepare_batch,
        run=run,
        config_yaml=OmegaConf.to_yaml(OmegaConf.create(sections)),
        seed=SEED,
        start=open_start(train_config, run),
        facts={"class_names": list(classes)},
        hooks=hooks,
    )


def bits(run, step):
    """sha256 of the weights, EMA and optimizer in the checkpoint of `step`."""
    files = checkpoint.open_checkpoint(Path(run) / "checkpoints" / f"step_{step:08d}").state["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def log(run):
    """The lines of log.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_s"} for line in lines]


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def main(run, death):
    event, _, number = death.partition(":")
    hooks = [Hook(every=int(number), call=die)] if event == "step" else []
    if event.endswith((".safetensors", ".json")):
        paths = []

        def sync(path, original=checkpoint.sync):
            paths.extend([path] if path.name == event else [])
            if len(paths) == int(number):
                die()
            original(path)

        checkpoint.sync = sync
    build(run, hooks=hooks).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
