"""`dit-moe eval` for test_evaluation.py: notes which images each process makes, and can kill itself.

eval_script.py FOLDER DEATHS words…: indices go to FOLDER/rank_<i>.txt. DEATHS is "none", or like "2,1": it first dies
of kill -9 twice, in forks, after making 2 shards and then 1.
"""

import os
import signal
import sys
from pathlib import Path

from dit_moe.cli import main
from dit_moe.evaluation.features import Extraction
from dit_moe.evaluation.runs import GeneratedSource
from tests.scripts import die

folder, deaths, words = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
shards = -1  # left to make before it dies; -1: it lives
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
            die()
        shards -= 1
    return make(self, *args)


def die_after(count):
    """Evaluate in a fork, which must not come to its end."""
    global shards
    child = os.fork()
    if child == 0:
        shards = count
        main(["eval", *words])
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL or (folder / "metrics.json").exists():
        sys.exit("the process to be killed ended by itself")


GeneratedSource.batches, Extraction._make = noting, mortal
for count in deaths.split(",") if deaths != "none" else []:
    die_after(int(count))
sys.exit(main(["eval", *words]))
