"""`dit-moe eval` for test_evaluation.py: notes which images each process makes, and can kill itself.

eval_script.py FOLDER SHARDS words…: indices go to FOLDER/rank_<i>.txt; after SHARDS shards (-1: never) comes kill -9.
"""

import os
import signal
import sys
from pathlib import Path

from dit_moe.cli import main
from dit_moe.evaluation.extraction import Extraction
from dit_moe.evaluation.sources.generated import GeneratedSource

folder, shards, words = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
make, batches = Extraction._make, GeneratedSource.batches


def noting(self, parts):
    for part in parts:
        with (folder / f"rank_{os.environ.get('RANK', 0)}.txt").open("a") as file:
            file.writelines(f"{i}\n" for i in part)
        yield from batches(self, [part])


def mortal(self, *args):
    global shards
    if isinstance(self.source, GeneratedSource):
        if shards == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        shards -= 1
    make(self, *args)


GeneratedSource.batches, Extraction._make = noting, mortal
sys.exit(main(["eval", *words]))
