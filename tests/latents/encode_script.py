"""For test_encode.py: ``encode_script.py whole FOLDER AUTOENCODER`` encodes 50 digits; ``killed …`` dies five times.

It prints how many shards there were after each death. Deaths are those of forks, which need no start of their own.
``broken …`` encodes digits of which some are broken, prints which it was refused for, and goes on without them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from dit_moe.data import DATASETS
from dit_moe.latents.autoencoder import Autoencoder, AutoencoderConfig
from dit_moe.latents.encode import BROKEN, EncodingError
from dit_moe.processes import join_processes
from tests.latents.encoded import DIGITS, Spoilt, encoder


def main(what: str, folder: Path, model: str) -> None:
    join_processes()
    stage = Autoencoder(AutoencoderConfig(model=model))
    if what == "broken":
        spoilt = Spoilt(DATASETS.build(DIGITS, "train"), 50)
        made = encoder(folder, stage=stage, dataset=spoilt, workers=1)
        try:
            made.run()
        except EncodingError:
            found = [str(each["index"]) for each in json.loads((folder / BROKEN).read_text())]
            print(f"{','.join(found)}\n", end="", flush=True)  # at one go: another process prints its own
        made.run(skip_broken=True)
        return
    made = encoder(folder, stage=stage, shard_size=4, batch_size=3)
    if what == "whole":
        made.run()
        return
    stage.load()
    chance = random.Random(0)
    for _ in range(5):
        left = len(made.missing())
        child = os.fork()
        if child == 0:
            made.run()
            os._exit(0)
        while len(made.missing()) == left:  # some progress, then death at any moment of the next shard
            if os.waitpid(child, os.WNOHANG)[0]:
                sys.exit("the process to be killed ended by itself")
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(made.shards - len(made.missing()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
