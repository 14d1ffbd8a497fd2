"""For test_processes.py: tokenise, score, and run `dit-moe perplexity`, in as many processes as are started.

processes_script.py FOLDER: FOLDER/tokens, FOLDER/rank_<i>.json with the scores, FOLDER/rank_<i>.calls with the number
of batches that the process scored, and FOLDER/perplexity.json.
"""

import json
import os
import sys
from pathlib import Path

from dit_moe.evaluation import text as evaluation
from dit_moe.text.perplexity import score
from tests.cli.conftest import cli
from tests.interop.models import tiny_run
from tests.text.scoring import HOW, documents, network
from tests.text.tokens import tokenization


def main(folder: Path) -> None:
    tokenization(folder / "tokens", shard_tokens=200).run()
    rank = os.environ.get("RANK", "0")
    lm, calls = network(), []
    lm.register_forward_hook(lambda *_: calls.append(1))
    scores = score(lm, documents(), stride=9, batch_size=3, **HOW)
    (folder / f"rank_{rank}.json").write_text(json.dumps(scores.report() | {"nats": scores.nats_N.tolist()}))
    (folder / f"rank_{rank}.calls").write_text(str(len(calls)))
    opened, evaluation.open_text_run = evaluation.open_text_run, lambda *args, **how: tiny_run(Path("run"))
    assert cli("perplexity", "run", folder.parent / "a.txt", "--out", folder / "perplexity.json") == 0
    evaluation.open_text_run = opened


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_CPU"] = "true"
    main(Path(sys.argv[1]))
