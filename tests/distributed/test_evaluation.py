"""However many processes evaluate, and however often they are killed: the same features, the same result."""

from collections import Counter

import pytest

from tests.cli.conftest import cli
from tests.distributed.evaluating import COUNT, words


def features(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "metrics.features").rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def alone(processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert cli(*words(processes / "small", folder)) == 0
    return folder


@pytest.mark.parametrize("case, ranks", [("eval", 3), ("eval_killed", 1)], ids=["processes", "killed"])
def test_every_image_is_made_once_and_the_result_is_the_same(processes, alone, case, ranks):
    folder = processes / case
    made = [(folder / f"rank_{rank}.txt").read_text().split() for rank in range(ranks)]
    counts = Counter(index for each in made for index in each)
    assert len(counts) == COUNT and set(counts.values()) == {1} and all(made)
    assert features(folder) == features(alone)
    assert (folder / "metrics.json").read_text() == (alone / "metrics.json").read_text()


def test_another_sampler_seed_or_count_is_refused_naming_it(processes, alone, capsys):
    before = features(alone)
    for change, message in (
        ("sampler.steps=3", "sample.sampler.steps=2, not 3"),
        ("seed=1", "sample.seed=0, not 1"),
        ("guidance.scale=2", "sample.guidance.scale=1.0, not 2.0"),
        ("labels=random", "sample.labels=balanced, not random"),
        ("weights=model", "sample.weights=ema, not model"),
    ):
        assert cli(*words(processes / "small", alone, change)) == 2
        assert message in capsys.readouterr().err
    assert features(alone) == before
