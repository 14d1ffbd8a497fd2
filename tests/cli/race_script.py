"""For test_races.py: ``race_script.py RUN FOLDER PAIRS`` lets pairs of `dit-moe sample` race for one output.

The two of a pair have different settings. Prints how the pairs ended; ends with an assertion if an output is damaged,
mixed, or not that of a command which ended well. RUN is a small run of digits.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

from dit_moe.cli import main as dit_moe
from dit_moe.tasks import images  # noqa: F401  before forking: it takes seconds
from tests.scripts import prepare_forks


def sampling(run: Path, seed: int, out: Path) -> int:
    """Write all that `dit-moe sample` can into a folder, which is yet to be made; the exit code."""
    return dit_moe(["sample", str(run), f"seed={seed}", "--save", "npz,png,grid", "--out", str(out)])


def forked(run: Path, seed: int, out: Path, delay: float = 0) -> int:
    """The id of a process that samples."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
                time.sleep(delay)
                code = sampling(run, seed, out)
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(out: Path) -> dict[str, str]:
    """By the paths of all that a command wrote, hashes of what does not depend on time."""
    files = [path for path in sorted(out.parent.rglob("*")) if path.is_file()]
    return {str(path.relative_to(out.parent)): hashlib.sha256(_lasting(path)).hexdigest() for path in files}


def _lasting(path: Path) -> bytes:
    if path.name == "sample.json":
        return json.dumps(json.loads(path.read_text()) | {"seconds": 0}).encode()
    return path.read_bytes()


def main(run: Path, folder: Path, pairs: int) -> None:
    prepare_forks()
    alone = []
    for seed in (1, 2):
        out = folder / f"alone{seed}" / "out"
        out.parent.mkdir(parents=True)
        start = time.perf_counter()
        assert ended(forked(run, seed, out)) == 0
        alone.append(content(out))
    assert alone[0] != alone[1] and alone[0].keys() == alone[1].keys()
    chance, seen = random.Random(0), Counter[tuple[int, ...]]()
    longest = (time.perf_counter() - start) / 2
    for number in range(pairs):
        out = folder / str(number) / "out"
        out.parent.mkdir()
        delays = 0, chance.choice((0, chance.uniform(0, longest)))
        codes = tuple(map(ended, [forked(run, seed, out, delay) for seed, delay in zip((1, 2), delays, strict=True)]))
        assert set(codes) <= {0, 2} and 0 in codes, f"{number}: exit codes {codes}"
        possible = [each for each, code in zip(alone, codes, strict=True) if code == 0]
        assert content(out) in possible, f"{number}: not the output of any that ended well, {codes}"
        seen[codes] += 1
    print(*(f"{codes}×{count}" for codes, count in sorted(seen.items())), sep="  ")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
