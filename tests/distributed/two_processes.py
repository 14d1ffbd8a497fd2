"""What each of two processes does for test_two_processes.py, leaving what it saw in FOLDER/rank_<i>.json.

Its arguments are the family of models, the folder of its data, and FOLDER, in which "one" is a run of one process. What
no family could change happens with the DiT alone.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dit_moe import checkpoint
from dit_moe.config import ConfigError
from dit_moe.diffusion import SamplingError
from dit_moe.distributed import on_all, on_main
from dit_moe.training import Hook
from tests.training import tiny_run
from tests.training.tiny_run import FAMILIES, LONG, OTHER_CLASSES

RANK = int(os.environ["RANK"])


@atexit.register  # before the processes join, so that it is called after they part
def tell_threads():
    """Which threads there are when the interpreter ends."""
    names = sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    Path(sys.argv[3], f"threads_{RANK}.json").write_text(json.dumps(names))


FAMILY = FAMILIES[sys.argv[1]]
build = partial(tiny_run.build, family=sys.argv[1], data=sys.argv[2])
UNEVEN = LONG | {"micro_batch": 9}  # 9 and 7 of a process's 16 rows
SHORT = LONG | {"steps": 3}


def ending(run, **kwargs):
    """How a run ends, in words."""
    try:
        build(run, **kwargs).train()
    except Exception as error:  # whatever it is, it is what the test asks about
        return f"{type(error).__name__}: {error}"
    return "finished"


def spoilt(raw, random):
    """Rows of the second process alone hold a NaN."""
    batch = FAMILY.prepare(raw, random)
    return {name: rows + math.nan if rows.is_floating_point() and RANK == 1 else rows for name, rows in batch.items()}


def overflowing(model, batch, random):
    """The loss of the second process alone is a NaN."""
    terms = FAMILY.objective(10)(model, batch, random)
    return terms | {"loss": terms["loss"] * (math.nan if RANK == 1 else 1)}


def in_seventh(happen):
    """A preparation in which something happens to the second process alone, in that of its 7th step."""
    calls = []

    def prepare(raw, random):
        calls.append(1)
        if RANK == 1 and len(calls) == 7:
            happen()
        return FAMILY.prepare(raw, random)

    return prepare


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def refuse(error):
    if RANK == 1:
        raise error


def unequal_calls(calls, step, model):
    """The first process calls the averaged model once more than the second, as a sampler with adaptive steps may."""
    outputs = [model(*FAMILY.inputs()) for _ in range(2 - RANK)]
    calls.append([step, bool(torch.isfinite(outputs[0]).all()), sum(p.numel() for p in model.parameters())])


def digests(module):
    """Of what this process holds as a whole."""
    state = checkpoint.state_of(module)
    whole = {name: tensor for name, tensor in state.items() if not isinstance(tensor, DTensor)}
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in whole.items()}


def held(tensors):
    return sum(tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel() for tensor in tensors)


def train_both_ways(folder: Path, parallel: str) -> dict[str, Any]:
    """The same runs for ddp and fsdp2, in folders whose names begin with that."""
    run = folder.joinpath
    seen: dict[str, Any] = {"calls": []}
    seen["nan"] = ending(run(f"{parallel}_nan"), objective=overflowing, parallel=parallel, p0=0.7)
    hook = Hook(every=10, call=partial(unequal_calls, seen["calls"]))
    trainer = build(run(parallel), hooks=[hook], **UNEVEN | {"parallel": parallel})
    seen["second_half"] = trainer.prefetcher.batches.batch(0)[16:]
    trainer.train()
    seen["digests"] = [digests(trainer.model), digests(trainer.ema.module)]
    moments = [slot for state in trainer.training_step.optimizer.state.values() for slot in state.values() if slot.ndim]
    everything = [trainer.model.parameters(), trainer.ema.module.parameters(), moments]
    seen["held"] = [held(tensors) for tensors in everything]
    build(run(f"{parallel}_recompute"), recompute=True, **SHORT | {"parallel": parallel}).train()
    return seen


def once_both_ways(folder: Path, parallel: str) -> dict[str, Any]:
    """The same again, as far as families play no part."""
    run, quick = folder.joinpath, {"parallel": parallel, "p0": 0.7}
    seen = {"spoilt": ending(run(f"{parallel}_nan"), prepare_batch=spoilt, **quick)}
    seen["signal"] = ending(run(f"{parallel}_signal"), prepare_batch=in_seventh(terminate), **quick)
    failing = in_seventh(partial(refuse, ValueError("only here")))
    seen["failed"] = ending(run(f"{parallel}_failed"), prepare_batch=failing, **quick)
    short = SHORT | {"parallel": parallel}
    build(run(f"{parallel}_bf16"), mixed_precision="bf16", **short).train()
    build(run(f"{parallel}_tuned"), init_from=str(run("one")), classes=OTHER_CLASSES, **short).train()
    return seen


def once(folder: Path) -> dict[str, Any]:
    """What is about both ways, or none."""
    seen: dict[str, Any] = {}
    go_on(folder, "fsdp2", "fsdp2_again", **UNEVEN | {"parallel": "fsdp2"})
    go_on(folder, "one", "one_then_fsdp2", **LONG | {"parallel": "fsdp2"})
    go_on(folder, "fsdp2", "fsdp2_then_ddp", **LONG)
    seen["split"] = ending(folder / ("ddp_signal" if RANK == 0 else "elsewhere"), p0=0.7)
    with (folder / "ddp_signal" / ".lock").open("a") as other:
        if RANK == 0:
            fcntl.flock(other, fcntl.LOCK_EX)
        seen["in_use"] = ending(folder / "ddp_signal", p0=0.7)
    seen["refused"] = []
    for error in (ConfigError("train.lr", "=0 only here"), SamplingError("only here")):
        try:
            on_all(partial(refuse, error))
        except Exception as raised:
            seen["refused"].append(f"{type(raised).__name__}: {raised}")
    return seen


def go_on(folder: Path, old: str, new: str, **options: Any) -> None:
    """Go on from step 10 of the run `old` in the folder `new`."""

    def copy() -> None:
        shutil.copytree(folder / old, folder / new)
        shutil.rmtree(checkpoint.latest(folder / new))

    on_main(copy)
    build(folder / new, **options).train()


def main(folder: Path) -> None:
    seen: dict[str, Any] = {parallel: train_both_ways(folder, parallel) for parallel in ("ddp", "fsdp2")}
    if FAMILY.name.startswith("DiT"):
        for parallel in ("ddp", "fsdp2"):
            seen[parallel] |= once_both_ways(folder, parallel)
        seen |= once(folder)
    (folder / f"rank_{RANK}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[3]))
