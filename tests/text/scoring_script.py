"""Score the documents of scoring.py for test_perplexity.py; each process writes what it got, and how often it worked.

scoring_script.py FOLDER: FOLDER/rank_<i>.json and rank_<i>.calls.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from dit_moe.text.perplexity import score
from tests.text.scoring import EOS, LENGTH, VOCAB, documents, network


def main(folder: Path) -> None:
    rank = os.environ.get("RANK", "0")
    lm, calls = network(), []
    hidden = lm.hidden
    lm.hidden = lambda tokens: calls.append(1) or hidden(tokens)
    scores = score(lm, documents(), eos=EOS, length=LENGTH, vocab_size=VOCAB, stride=9, batch_size=3)
    report = scores.report() | {"nats": scores.nats_N.tolist()}
    folder.mkdir(exist_ok=True)
    (folder / f"rank_{rank}.json").write_text(json.dumps(report))
    (folder / f"rank_{rank}.calls").write_text(str(len(calls)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
