"""A run small enough for tests: a DTop-p model of 2 blocks, of the digits or of a little text.

As a script, ``tiny_run.py DATA FOLDER FAMILY=DEATH…``, it trains FOLDER/FAMILY of each in a fork that dies of kill -9:
after step N for the DEATH ``step:N``, and for ``FILE:N`` when FILE of the Nth checkpoint is being put on the disk.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from dit_moe import checkpoint, config
from dit_moe.data import DATASETS
from dit_moe.diffusion import OBJECTIVES
from dit_moe.models import MODELS
from dit_moe.moe import MoEConfig
from dit_moe.moe.routers.dtopp import ControllerConfig, DTopPConfig
from dit_moe.text.objective import NextToken, NextTokenConfig
from dit_moe.text.sequences import TokensConfig, TokenSequences
from dit_moe.text.token_shards import MANIFEST
from dit_moe.training import Hook, TrainConfig, Trainer, Unit, open_start
from tests.scripts import die, prepare_forks
from tests.text.tokens import tokenized

SEED = 5
DIGITS = tuple("0123456789")
DEFAULTS = {"steps": 20, "batch_size": 32, "lr": 1e-3, "log_every": 5, "checkpoint_every": 10}
LONG = {"steps": 20, "log_every": 1, "grad_clip": 0.3}
OTHER_CLASSES = ("9", *"abcdefgh", "0", "1")
LENGTH = 16  # tokens of a row, as many as a DiT has of an image
VOCAB = 257  # bytes, and the end of text


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


def digits(folder):
    return DATASETS.build(DATASETS.config_class("digits")(), "train")


def tokens(folder):
    """Some text in shards of 1000 bytes, hardly two rows of which are alike; made in `folder` when first asked for."""
    if not (folder / MANIFEST).exists():
        tokenized(folder)
    return TokenSequences(TokensConfig(path=str(folder), length=LENGTH), "train")


def flow(classes):
    return OBJECTIVES.build(OBJECTIVES.config_class("flow")(), num_classes=classes)


@dataclass(frozen=True)
class Family:
    """What a tiny run of a family of models is made of."""

    name: str  # of the model, in the registry
    dataset: Callable[[Path], Any]  # in a folder of its own
    shape: Callable[[int], dict[str, Any]]  # of the model, by the number of classes
    objective: Callable[[int], Any]
    prepare: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]]  # of the model, two rows
    term: str  # of the loss
    unit: Unit
    experts: str = "auto"  # how they are computed


DIT = Family(
    "DiT-custom/2-4E2A",
    digits,
    lambda classes: {"in_channels": 1, "input_size": 8, "num_classes": classes},
    flow,
    to_latents,
    lambda: (torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 1])),
    "mse",
    Unit("images"),
    "by_expert",  # which small ones would not be
)
MODERN = {"position_embedding": "rotary", "norm": "rms_norm", "activation": "swiglu", "qk_norm": "layer_norm"}
FAMILIES = {
    "DiT": DIT,
    "DiT-modern": replace(DIT, shape=lambda classes: DIT.shape(classes) | MODERN, experts="grouped"),
    "LM": Family(
        "LM-custom-4E2A",
        tokens,
        lambda classes: {"vocab_size": VOCAB, "max_length": LENGTH},
        lambda classes: NextToken(NextTokenConfig(z_loss=1e-4)),
        lambda raw, random: raw,
        lambda: (torch.randint(VOCAB, (2, LENGTH)),),
        "next_token",
        Unit("tokens", LENGTH),
    ),
}


def build(
    run,
    *,
    family="DiT",
    data=Path(),
    prepare_batch=None,
    objective=None,
    hooks=(),
    curves=None,
    classes=DIGITS,
    p0=None,
    capacity_factor=None,
    width=32,
    recompute=False,
    **train,
) -> Trainer:
    """A trainer with `train` over DEFAULTS; the same weights every time. With `p0` nothing is solved at the start."""
    kind, train_config = FAMILIES[family], TrainConfig(**(DEFAULTS | train))
    router = DTopPConfig(controller=ControllerConfig(p0=p0))
    experts: Any = "auto" if capacity_factor else kind.experts
    moe = MoEConfig(router=router, implementation=experts, capacity_factor=capacity_factor)
    shape = {"width": width, "depth": 2, "heads": 2, **kind.shape(len(classes))}
    model_config = MODELS.config_class(family)(name=kind.name, moe=moe, recompute=recompute, **shape)
    sections = {"train": config.dump(train_config), "model": config.dump(model_config), "seed": SEED}
    torch.manual_seed(0)
    return Trainer(
        train_config,
        model=MODELS.build(model_config),
        objective=objective or kind.objective(len(classes)),
        dataset=Recorded(kind.dataset(Path(data))),
        prepare_batch=prepare_batch or kind.prepare,
        run=run,
        config_yaml=OmegaConf.to_yaml(OmegaConf.create(sections)),
        seed=SEED,
        start=open_start(train_config, run),
        facts={"class_names": list(classes)},
        hooks=hooks,
        curves=curves,
        unit=kind.unit,
    )


def bits(run, step):
    """sha256 of the weights, EMA and optimizer in the checkpoint of `step`."""
    files = checkpoint.open_checkpoint(Path(run) / "checkpoints" / f"step_{step:08d}").state["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def log(run):
    """The lines of log.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    timed = ("seconds", "images_per_s", "tokens_per_s")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def die_at(death, build):
    event, _, number = death.partition(":")
    paths, sync = [], checkpoint.sync

    def mortal(path):
        paths.extend([path] if path.name == event else [])
        if len(paths) == int(number):
            die()
        sync(path)

    checkpoint.sync = mortal
    build(hooks=[Hook(every=int(number), call=lambda *_: die())] if event == "step" else []).train()


def main(data, folder, *deaths):
    prepare_forks()
    for family, death in (each.split("=") for each in deaths):
        child = os.fork()
        if child == 0:
            die_at(death, partial(build, Path(folder) / family, family=family, data=data))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


if __name__ == "__main__":
    main(*sys.argv[1:])
