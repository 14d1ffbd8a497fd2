"""`train.compile=true`: blocks compiled one by one, MoE layers with them where they have a capacity."""

import pytest
import torch

from dit_moe.config import ConfigError
from dit_moe.models.compilation import require_compiler
from tests.training.tiny_run import log

pytestmark = pytest.mark.parametrize("family", ["DiT"], indirect=True)


@pytest.mark.parametrize("capacity_factor", [None, 2.0])
def test_compiled_blocks_learn_the_same_within_rounding_and_only_layers_without_a_capacity_break_the_graph(
    build, unbroken, tmp_path, capacity_factor
):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    build(tmp_path, steps=5, micro_batch=16, compile=True, capacity_factor=capacity_factor).train()
    for plain, compiled in zip(log(unbroken)[:1], log(tmp_path), strict=True):
        for name in ("loss", "grad_norm", "active", "p"):
            assert compiled[name] == pytest.approx(plain[name], rel=1e-5)
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert ["MoELayer._compute" in each for each in breaks] == ([] if capacity_factor else [True])


def test_without_a_compiler_it_is_refused_before_the_training(build, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"train\.compile=true needs the compiler no-such-compiler; install it"):
        build(tmp_path, compile=True)
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the compiler no-such-compiler and the package triton"):
        require_compiler("cuda", "train.compile")
