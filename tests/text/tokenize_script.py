"""For test_tokenization.py: ``tokenize_script.py FOLDER`` tokenises and dies five times."""

from __future__ import annotations

import sys
from pathlib import Path

import transformers  # noqa: F401  before forking: it takes seconds

from dit_moe.distributed import join_processes
from tests.scripts import killed_five_times
from tests.text.tokens import tokenization

if __name__ == "__main__":
    join_processes()
    folder = Path(sys.argv[1])
    killed_five_times(
        lambda: tokenization(folder, shard_tokens=200).run(), lambda: len(list(folder.glob("shards/*.json")))
    )
