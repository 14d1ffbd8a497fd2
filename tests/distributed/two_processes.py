"""What each of two processes does for test_two_processes.py, leaving what it saw in FOLDER/rank_<i>.json."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tiny_run import build, to_latents

from dit_moe import checkpoint
from dit_moe.config import ConfigError
from dit_moe.diffusion import SamplingError
from dit_moe.processes import on_all
from dit_moe.training import Hook

RANK = int(os.environ["RANK"])


def ending(run, **kwargs):
    """How a run ends, in words."""
    try:
        build(run, **kwargs).train()
    except Exception as error:  # whatever it is, it is what the test asks about
        return f"{type(error).__name__}: {error}"
    return "finished"


def spoilt(raw, random):
    """Rows of the second process alone hold a NaN."""
    batch = to_latents(raw, random)
    batch["latents"] += math.nan if RANK == 1 else 0
    return batch


def make_signalled():
    """SIGTERM reaches the second process alone, in its 7th step."""
    calls = []

    def prepare(raw, random):
        calls.append(1)
        if RANK == 1 and len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return to_latents(raw, random)

    return prepare


def refuse(error):
    if RANK == 1:
        raise error


def main(folder: Path) -> None:
    seen: dict[str, Any] = {
        "uneven": ending(folder / "uneven", batch_size=31),
        "nan": ending(folder / "nan", prepare_batch=spoilt, p0=0.7),
        "signal": ending(folder / "signal", prepare_batch=make_signalled(), p0=0.7),
    }
    seen["split"] = ending(folder / ("signal" if RANK == 0 else "elsewhere"), p0=0.7)
    with (folder / "signal" / ".lock").open() as other:
        if RANK == 0:
            fcntl.flock(other, fcntl.LOCK_EX)
        seen["in_use"] = ending(folder / "signal", p0=0.7)
    seen["refused"] = []
    for error in (ConfigError("train.lr", "=0 only here"), SamplingError("only here")):
        try:
            on_all(partial(refuse, error))
        except Exception as raised:
            seen["refused"].append(f"{type(raised).__name__}: {raised}")
    seen["hooks"] = []
    trainer = build(folder / "two", hooks=[Hook(every=10, call=lambda step, model: seen["hooks"].append(step))])
    seen["second_half"] = trainer.order.batch(0)[16:]
    trainer.train()
    state = checkpoint.state_of(trainer.model) | {
        f"ema.{name}": tensor for name, tensor in checkpoint.state_of(trainer.ema.module).items()
    }
    seen["digests"] = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in state.items()}
    (folder / f"rank_{RANK}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
