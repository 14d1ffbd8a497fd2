"""For test_tokenization.py: ``tokenize_script.py killed FOLDER`` dies five times; ``whole …`` tokenises to the end.

It prints how many shards there were after each death. Deaths are those of forks, which need no start of their own.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import transformers  # noqa: F401  before forking: it takes seconds

from dit_moe.processes import join_processes
from tests.text.tokens import tokenization


def main(what: str, folder: Path) -> None:
    join_processes()
    if what == "whole":
        tokenization(folder, shard_tokens=200).run()
        return
    chance = random.Random(0)
    for _ in range(5):
        before = shards(folder)
        child = os.fork()
        if child == 0:
            tokenization(folder, shard_tokens=200).run()
            os._exit(0)
        while shards(folder) == before:  # some progress, then death at any moment of the next shards
            if os.waitpid(child, os.WNOHANG)[0]:
                sys.exit("the process to be killed ended by itself")
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(shards(folder))


def shards(folder: Path) -> int:
    return len(list((folder / "shards").glob("*.json")))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
