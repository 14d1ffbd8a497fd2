"""The `train` section of a config."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from dit_moe.config import require

MOST_WORKERS = 1024


def _free(default: Any) -> Any:
    """A field that a resumed run may change."""
    return field(default=default, metadata={"free": True})


def _recorded(default: Any) -> Any:
    """A field that a run may change from a checkpoint on: its log and all later checkpoints say so."""
    return field(default=default, metadata={"recorded": True})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. The defaults are DiT's published run: AdamW, constant 1e-4, no weight decay, batch 256, EMA 0.9999.

    A run may be resumed with other values of the fields that are `_free`: they change nothing that it learns, or, for
    `steps`, only how long it goes on. (A cosine schedule then bends towards the new end.) Those that are `_recorded`
    are what helps a run whose loss has overflowed.
    """

    steps: int = _free(400_000)  # optimizer steps of the whole run
    init_from: str | None = None  # run or checkpoint folder whose averaged weights the run starts from; None: nothing
    batch_size: int = 256  # rows per optimizer step, over all processes and micro-batches
    micro_batch: int | None = _free(None)  # rows per forward pass on one process; None: all at once
    lr: float = _recorded(1e-4)
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices only: not on embeddings, biases, norms or router scalars
    warmup_steps: int = _recorded(0)  # the learning rate grows linearly over so many steps
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr_ratio: float = 0.0  # the cosine ends at this fraction of lr
    grad_clip: float | None = _recorded(None)  # largest gradient norm; None: never scaled down
    # auto: bf16 on GPUs that have it, else fp32. On two CPU cores with AMX, bf16 made the digits model (width 96) half
    # as fast, a width of 768 some 1.2 (experts) to 1.8 times (dense) faster: there the choice is the user's.
    mixed_precision: Literal["auto", "fp32", "bf16"] = "auto"
    ema_decay: float = 0.9999  # reached gradually: min(ema_decay, (1 + n) / (10 + n)) after n updates
    # What each of several processes holds: the whole model, or a slice of its weights, gradients, moments and average,
    # which takes less memory and more traffic. Micro-batches add up whole gradients either way, to send them once.
    parallel: Literal["ddp", "fsdp2"] = _free("ddp")
    deterministic: bool = _free(False)  # kernels without atomic sums: what makes a GPU run repeat bit for bit; slower
    compile: bool = _free(False)  # have torch.compile fuse each block; takes a minute at the start
    workers: int = _free(0)  # processes that read ahead; 0: the training process reads
    checkpoint_every: int = _free(10_000)  # steps
    keep_checkpoints: int = _free(2)  # how many of the newest to keep
    log_every: int = _free(100)  # steps per line of log.jsonl
    sample_every: int | None = _free(None)  # steps between grids of samples; None: no grids
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = _free(())  # beside log.jsonl
    run_name: str | None = _free(None)  # in wandb and trackio; None: the run folder's
    run_group: str | None = _free(None)  # of runs that wandb and trackio show together

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every", "keep_checkpoints", "log_every"):
            require(getattr(self, name) >= 1, self, name, "must be at least 1")
        for name in ("micro_batch", "sample_every"):
            require(getattr(self, name) is None or getattr(self, name) >= 1, self, name, "must be at least 1, or null")
        require(self.init_from != "", self, "init_from", "is empty; name a run, or null for none")
        for name in ("run_name", "run_group"):
            require(getattr(self, name) != "", self, name, "is empty; write a name, or null for none")
        require(self.workers <= MOST_WORKERS, self, "workers", f"must be at most {MOST_WORKERS:,} processes")
        for name in ("weight_decay", "warmup_steps", "workers"):
            require(getattr(self, name) >= 0, self, name, "must be at least 0")
        for name in ("lr", "eps"):
            require(getattr(self, name) > 0, self, name, "must be above 0")
        two = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(two, self, "betas", "must be two numbers in [0, 1)")
        require(0 <= self.ema_decay < 1, self, "ema_decay", "must lie in [0, 1)")
        require(0 <= self.min_lr_ratio <= 1, self, "min_lr_ratio", "must lie in [0, 1]")
        require(self.grad_clip is None or self.grad_clip > 0, self, "grad_clip", "must be above 0, or null for none")


FREE = tuple(each.name for each in fields(TrainConfig) if each.metadata.get("free"))
RECORDED = tuple(each.name for each in fields(TrainConfig) if each.metadata.get("recorded"))
