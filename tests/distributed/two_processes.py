"""What each of two processes does for test_two_processes.py, leaving what it saw in FOLDER/rank_<i>.json."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import sys
from pathlib import Path

from tiny_run import build, to_latents

from dit_moe import checkpoint

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
    batch["latents"][4:] += math.nan if RANK == 1 else 0
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


def main(folder: Path) -> None:
    seen = {
        "uneven": ending(folder / "uneven", batch_size=31),
        "nan": ending(folder / "nan", prepare_batch=spoilt),
        "signal": ending(folder / "signal", prepare_batch=make_signalled()),
    }
    trainer = build(folder / "two")
    trainer.train()
    state = checkpoint.state_of(trainer.model) | {
        f"ema.{name}": tensor for name, tensor in checkpoint.state_of(trainer.ema.module).items()
    }
    seen["digests"] = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in state.items()}
    (folder / f"rank_{RANK}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
