"""Score the documents of scoring.py for test_perplexity.py; each process writes what it got, and how often it worked.

scoring_script.py FOLDER: FOLDER/rank_<i>.json and rank_<i>.calls.
"""

import json
import os
import sys
from pathlib import Path

from dit_moe.text.perplexity import score
from tests.text.scoring import HOW, documents, network


def main(folder: Path) -> None:
    rank = os.environ.get("RANK", "0")
    lm, calls = network(), []
    lm.register_forward_hook(lambda *_: calls.append(1))
    scores = score(lm, documents(), stride=9, batch_size=3, **HOW)
    report = scores.report() | {"nats": scores.nats_N.tolist()}
    folder.mkdir(exist_ok=True)
    (folder / f"rank_{rank}.json").write_text(json.dumps(report))
    (folder / f"rank_{rank}.calls").write_text(str(len(calls)))


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_CPU"] = "true"
    main(Path(sys.argv[1]))
