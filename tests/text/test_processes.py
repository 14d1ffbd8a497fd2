"""Two processes give what one gives: tokens, scores, and the command's result."""

import json

import pytest
import torch

from tests.folders import contents
from tests.scripts import start
from tests.text import processes_script
from tests.text.scoring import documents
from tests.text.tokens import texts, write_lines

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Folders of one process and of two, and what the two printed."""
    root = tmp_path_factory.mktemp("processes")
    for name in ("one", "two"):
        write_lines(root / name / "text.jsonl", texts(60))
    (root / "a.txt").write_text("Sphinx of black quartz, judge my vow. " * 20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of several has: with more, a matrix product may round otherwise
    processes_script.main(root / "one")
    torch.set_num_threads(threads)
    done = start(processes_script.__file__, root / "two", processes=2)
    assert done.returncode == 0, done.stderr
    return root / "one", root / "two", done.stdout


def test_two_processes_tokenise_to_the_same_bytes(outputs):
    one, two = (
        contents(folder / "tokens" / "shards") | contents(folder / "tokens" / "tokenizer") for folder in outputs[:2]
    )
    assert one == two and len(one) > 10


def test_two_processes_share_the_scoring_and_get_the_same_bytes_as_one(outputs):
    one, two, _ = outputs
    alone = (one / "rank_0.json").read_bytes()
    assert json.loads(alone)["documents"] == len(documents())
    assert all((two / f"rank_{rank}.json").read_bytes() == alone for rank in range(2))
    calls = [int((two / f"rank_{rank}.calls").read_text()) for rank in range(2)]
    assert sum(calls) == int((one / "rank_0.calls").read_text()) and max(calls) - min(calls) <= 1


def test_the_command_writes_the_same_file_and_prints_it_once(outputs):
    one, two, printed = outputs
    assert (two / "perplexity.json").read_bytes() == (one / "perplexity.json").read_bytes()
    assert printed == (one / "perplexity.json").read_text()
