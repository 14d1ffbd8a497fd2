"""For test_tokenization.py: ``tokenize_script.py killed FOLDER`` dies five times; ``whole …`` tokenises to the end."""

from __future__ import annotations

import sys
from pathlib import Path

import transformers  # noqa: F401  before forking: it takes seconds

from dit_moe.distributed import join_processes
from tests.scripts import killed_five_times
from tests.text.tokens import tokenization


def main(what: str, folder: Path) -> None:
    join_processes()

    def work() -> None:
        tokenization(folder, shard_tokens=200).run()

    if what == "whole":
        work()
    else:
        killed_five_times(work, lambda: len(list(folder.glob("shards/*.json"))))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
