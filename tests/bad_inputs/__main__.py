"""Draw bad inputs, give them to the commands, and print every answer that is not as it should be."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from tests.bad_inputs import archives, configs, originals, own_files, runner, text  # noqa: F401  they add their kinds
from tests.bad_inputs.kinds import KINDS, Place
from tests.scripts import prepare_forks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--kind", choices=KINDS, help="only this kind")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="only this case of the seed, with its whole answer")
    parser.add_argument("--good", type=Path, help="a folder for the good files, made if it is missing")
    parser.add_argument("--accepted", action="store_true", help="print what was accepted, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        good = args.good or root / "good"
        _import_all()
        if not good.exists():
            _make_good(good)
        counts: Counter[str] = Counter()
        began = time.monotonic()
        for number in range(args.count) if args.only is None else [args.only]:
            counts[_try(args, number, good, root / "case")] += 1
    shown = ", ".join(f"{count} {what}" for what, count in counts.most_common())
    print(f"{sum(counts.values())} bad inputs of seed {args.seed} in {time.monotonic() - began:.0f} s: {shown}")
    return int(counts["with a fault"] > 0)


def _try(args: argparse.Namespace, number: int, good: Path, folder: Path) -> str:
    random = Random(f"{args.seed} {number}")
    folder.mkdir()
    case = KINDS[args.kind or random.choice(list(KINDS))](Place(good, folder, random))
    before, good_before = runner.contents(folder), runner.contents(good)
    answer = runner.run(case.words, folder)
    found = runner.faults(answer, before, runner.contents(folder))
    if runner.contents(good) != good_before:
        found.append("changed a file of another folder")
    last = answer.err.strip()[-400:]
    if args.only is not None:
        print(folder, case, answer.out[-3000:], answer.err, f"exit {answer.code}", sep="\n")
    if found:
        print(f"FAULT {number} {case.what}: {'; '.join(found)}\n  {' '.join(case.words)[:200]}\n  {last}\n", flush=True)
    elif answer.code == 0 and args.accepted:
        print(f"accepted {number} {case.what}\n  {' '.join(case.words)[:200]}\n", flush=True)
    shutil.rmtree(folder)
    return "with a fault" if found else "accepted" if answer.code == 0 else "refused in a sentence"


def _make_good(folder: Path) -> None:
    def run(*words: object) -> int:
        answer = runner.run([str(word) for word in words], folder, limit=600)
        if answer.code:
            print(answer.err[-2000:], file=sys.stderr)
        return answer.code

    folder.mkdir(parents=True)
    originals.make(folder, run)


def _import_all() -> None:
    """What the commands import, so that forks need not; nothing of it is called, as that would start threads."""
    import importlib
    import pkgutil

    import dit_moe.cli

    for module in pkgutil.walk_packages(dit_moe.__path__, "dit_moe."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    prepare_forks()


if __name__ == "__main__":
    sys.exit(main())
