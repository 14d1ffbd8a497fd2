"""However many processes evaluate, and however often they are killed: the same features, the same result."""

from collections import Counter
from pathlib import Path

import pytest

from tests.cli.conftest import CONFIG, SMALL, cli
from tests.scripts import said

SCRIPT = Path(__file__).parent / "eval_script.py"
COUNT = 503


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert cli("train", CONFIG, "--run", folder, *SMALL) == 0
    return folder


def evaluate(run, folder, processes=1, deaths="none"):
    """Leaves the result in folder/metrics.json and its features beside it."""
    words = [run, "digits", f"count={COUNT}", "--seeds", "1", "--out", folder / "metrics.json"]
    said(SCRIPT, folder, deaths, *words, processes=processes)


def features(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "metrics.features").rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    evaluate(run, folder)
    return folder


@pytest.mark.parametrize("processes, deaths", [(3, "none"), (1, "2,1")], ids=["processes", "killed"])
def test_every_image_is_made_once_and_the_result_is_the_same(run, alone, tmp_path, processes, deaths):
    evaluate(run, tmp_path, processes, deaths)
    made = [(tmp_path / f"rank_{rank}.txt").read_text().split() for rank in range(processes)]
    counts = Counter(index for each in made for index in each)
    assert len(counts) == COUNT and set(counts.values()) == {1} and all(made)
    assert features(tmp_path) == features(alone)
    assert (tmp_path / "metrics.json").read_text() == (alone / "metrics.json").read_text()


def test_another_sampler_seed_or_count_is_refused_naming_it(run, alone, capsys):
    before = features(alone)
    for change, message in (
        ("sampler.steps=3", "sample.sampler.steps=2, not 3"),
        ("seed=1", "sample.seed=0, not 1"),
        ("guidance.scale=2", "sample.guidance.scale=1.0, not 2.0"),
        ("labels=random", "sample.labels=balanced, not random"),
        ("weights=model", "sample.weights=ema, not model"),
    ):
        words = ["digits", f"count={COUNT}", change, "--seeds", "1", "--out", alone / "metrics.json"]
        assert cli("eval", run, *words) == 2
        assert message in capsys.readouterr().err
    assert features(alone) == before
