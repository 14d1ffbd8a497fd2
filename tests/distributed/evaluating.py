"""`dit-moe eval` in a process of test_evaluation.py: it notes which images it makes, and can die."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

from dit_moe.cli import main
from dit_moe.evaluation.extraction import Extraction
from dit_moe.evaluation.runs import GeneratedSource
from tests.scripts import die

COUNT = 503


def words(run: Path, folder: Path, *more: str) -> list[str]:
    """Of `dit-moe eval`, which leaves the result in folder/metrics.json and its features beside it."""
    return ["eval", str(run), "digits", f"count={COUNT}", *more, "--seeds", "1", "--out", str(folder / "metrics.json")]


def evaluate(run: Path, folder: Path, deaths: Sequence[int] = ()) -> int:
    """The indices go to folder/rank_<i>.txt. Before it ends, it dies in forks, each after so many shards of images."""
    folder.mkdir(exist_ok=True)
    make, batches, left = Extraction._make, GeneratedSource.batches, -1  # shards left to make; -1: it lives

    def noting(self, parts):
        for part in parts:
            with (folder / f"rank_{os.environ['RANK']}.txt").open("a") as file:
                file.writelines(f"{i}\n" for i in part)
            yield from batches(self, [part])

    def mortal(self, *args):
        nonlocal left
        if isinstance(self.source, GeneratedSource):
            if left == 0:
                die()
            left -= 1
        return make(self, *args)

    GeneratedSource.batches, Extraction._make = noting, mortal
    for count in deaths:
        child = os.fork()
        if child == 0:
            left = count
            main(words(run, folder))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert not (folder / "metrics.json").exists()
    return main(words(run, folder))
