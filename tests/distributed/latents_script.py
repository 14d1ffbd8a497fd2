"""For test_latents.py: ``latents_script.py FOLDER`` trains on the latents there, in each way of sharing the model."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.cli.conftest import cli
from tests.distributed.test_latents import words

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    sys.exit(max(cli("train", *words(folder, folder / way, f"train.parallel={way}")) for way in ("ddp", "fsdp2")))
