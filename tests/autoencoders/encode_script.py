"""For test_encode_processes.py: ``encode_script.py WHAT FOLDER AUTOENCODER`` encodes 50 digits.

``killed`` dies five times in FOLDER. ``together`` encodes them into FOLDER/whole; then digits of which some are broken
into FOLDER/broken, where it prints which it was refused for, and goes on without them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dit_moe.autoencoders.autoencoder import Autoencoder, AutoencoderConfig
from dit_moe.autoencoders.encoder import BROKEN, EncodingError
from dit_moe.data import DATASETS
from tests.autoencoders.encoded import DIGITS, WithBroken, encoder
from tests.scripts import killed_five_times


def main(what: str, folder: Path, model: str) -> None:
    stage = Autoencoder(AutoencoderConfig(model=model))
    if what == "killed":
        killed = encoder(folder, stage=stage, shard_size=4, batch_size=3)
        print(*killed_five_times(killed.run, lambda: len(killed.shards) - len(killed.missing())))
        return
    encoder(folder / "whole", stage=stage, shard_size=4, batch_size=3).run()
    without_broken(folder / "broken", stage)


def without_broken(folder: Path, stage: Autoencoder) -> None:
    made = encoder(folder, stage=stage, dataset=WithBroken(DATASETS.build(DIGITS, "train"), 50), workers=1)
    try:
        made.run()
    except EncodingError:
        found = [str(each["index"]) for each in json.loads((folder / BROKEN).read_text())]
        print(f"{','.join(found)}\n", end="", flush=True)  # at one go: another process prints its own
    made.run(skip_broken=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
