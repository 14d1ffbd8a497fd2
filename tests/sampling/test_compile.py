"""`sample.compile=true`: blocks compiled one by one, and only while a generator samples."""

import pytest
import torch

from dit_moe.config import ConfigError
from tests.cli.conftest import CONFIG, SMALL, cli
from tests.sampling.test_generator import generator


def test_compiled_blocks_make_the_same_images_within_rounding_count_the_same_experts_and_are_left_as_they_were():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    labels = torch.arange(7)
    plain, compiled = (generator(capacity_factor=1.0, p=0.6, compile=each) for each in (False, True))
    wanted, found = plain.generate(labels), compiled.generate(labels)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert (wanted.images.int() - found.images.int()).abs().max() <= 1
    assert found.active_experts == pytest.approx(wanted.active_experts, rel=1e-3)
    with torch.no_grad():
        inputs = torch.randn(2, 1, 8, 8), torch.zeros(2), labels[:2]
        assert torch.equal(plain.model(*inputs), compiled.model(*inputs))


def test_without_a_compiler_it_is_refused_before_any_work(finished_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    for words in (
        ["sample", finished_run, "compile=true", "--out", tmp_path / "out"],
        ["eval", finished_run, "compile=true", "--out", tmp_path / "metrics.json"],
        ["train", CONFIG, "--run", tmp_path / "out", *SMALL, "train.sample_every=2", "sample.compile=true"],
        ["quickstart", CONFIG, "--run", tmp_path / "out", *SMALL, "sample.compile=true"],
    ):
        assert cli(*words) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert "sample.compile=true needs the compiler no-such-compiler; install it, or set it to false" in told
        assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"sample\.compile=true needs the compiler"):
        generator(compile=True)
