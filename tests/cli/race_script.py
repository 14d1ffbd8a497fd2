"""For test_races.py: ``race_script.py RUN FOLDER PAIRS KIND…`` lets pairs of processes race for one output.

The two of a pair have different settings. Prints how the pairs ended; ends with an assertion if an output is damaged,
mixed, or not that of a command which ended well. RUN is a small run of digits; drawing is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dit_moe.cli import main as dit_moe
from dit_moe.cli import routing
from dit_moe.cli.routing import RoutingStats
from dit_moe.files import write_atomically
from dit_moe.tasks import images  # noqa: F401  before forking: it takes seconds

KINDS = ("sample", "eval", "encode", "export", "routing")
LATENTS = Path(__file__).parents[2] / "configs" / "digits_latent.yaml"
Command = Callable[[Path], int]  # writes into a folder, which is yet to be made; returns the exit code


def of(*words: object) -> Command:
    """``dit-moe words…``, with OUT for the folder."""
    return lambda out: dit_moe([str(word).replace("OUT", str(out)) for word in words])


def exporting(router: str, folder: Path) -> Command:
    from dit_moe.interop.export import export_run
    from tests.interop.models import tiny_lm, tiny_run

    run = tiny_run(folder, tiny_lm(router))

    def export(out: Path) -> int:
        try:
            export_run(run, out)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        return 0

    return export


def undrawn(stats: RoutingStats, folder: Path) -> list[str]:
    """In place of the report: how many images it is of."""
    write_atomically(folder / "report.html", str(stats.facts["images"]))
    return []


def commands(kind: str, run: Path, folder: Path) -> tuple[Command, Command]:
    """Two of a kind, in which everything that they write differs."""
    if kind == "sample":
        first, second = (of("sample", run, f"seed={i}", "--save", "npz,png,grid", "--out", "OUT") for i in (1, 2))
    elif kind == "eval":
        for i in (1, 2):
            assert of("sample", run, f"seed={i}", "count=40", "--save", "npz", "--out", folder / f"seed{i}")(run) == 0
        few = ["--extractor", "digits_cnn64", "--metrics", "fd", "--out", "OUT.json", "--save-stats", "OUT.npz"]
        first, second = (of("eval", folder / f"seed{i}", folder / "seed1", *few) for i in (1, 2))
    elif kind == "encode":
        first, second = (of("encode", LATENTS, "data.path=OUT", f"encode.dtype=fp{bits}") for bits in (16, 32))
    elif kind == "export":
        first, second = (exporting(router, folder) for router in ("dtopp", "topk"))
    else:
        assert kind == "routing", kind
        first, second = (of("routing", run, "--images", i, "--times", 2, "--out", "OUT") for i in (10, 20))
    return first, second


def forked(command: Command, out: Path, delay: float = 0) -> int:
    """The id of a process that runs a command."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
                time.sleep(delay)
                code = command(out)
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
    if path.suffix == ".npz" and path.name != "images.npz":  # its zip holds times
        with np.load(path) as arrays:
            return repr({name: arrays[name].tolist() for name in arrays}).encode()
    if path.name in ("sample.json", "routing.json"):
        found = json.loads(path.read_text())
        for entry in (found, found.get("facts", {})):
            entry.pop("seconds", None)
        return json.dumps(found).encode()
    return path.read_bytes()


def race(name: str, pair: tuple[Command, Command], folder: Path, pairs: int) -> None:
    alone = []
    for i, command in enumerate(pair):
        out = folder / name / f"alone{i}" / "out"
        out.parent.mkdir(parents=True)
        start = time.perf_counter()
        assert ended(forked(command, out)) == 0
        alone.append(content(out))
    assert alone[0] != alone[1] and alone[0].keys() == alone[1].keys()
    chance, seen = random.Random(0), Counter[tuple[int, ...]]()
    longest = (time.perf_counter() - start) / 2
    for number in range(pairs):
        out = folder / name / str(number) / "out"
        out.parent.mkdir()
        delays = 0, chance.choice((0, chance.uniform(0, longest)))
        children = [forked(command, out, delay) for command, delay in zip(pair, delays, strict=True)]
        codes = tuple(map(ended, children))
        found = content(out)
        assert set(codes) <= {0, 2} and 0 in codes, f"{name} {number}: exit codes {codes}"
        possible = [each for each, code in zip(alone, codes, strict=True) if code == 0]
        assert found in possible, f"{name} {number}: not the output of any that ended well, {codes}"
        seen[codes] += 1
    print(name, *(f"{codes}×{count}" for codes, count in sorted(seen.items())), sep="  ", flush=True)


def main(run: Path, folder: Path, pairs: int, *kinds: str) -> None:
    routing.write_report = undrawn
    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds or KINDS:
        race(kind, commands(kind, run, folder), folder, pairs)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
