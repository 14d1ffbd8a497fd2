"""torch.compile for the blocks of a model: what it needs, and whom it is done for."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from dit_moe.config import ConfigError


def require_compiler(device: str, option: str) -> None:
    """ConfigError, in the name of `option`, unless torch.compile has what it needs on a device of this kind."""
    compiler = os.environ.get("CXX", "g++") if device == "cpu" else os.environ.get("CC", "gcc")
    missing = [] if shutil.which(compiler) else [f"the compiler {compiler}"]
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        missing.append("the package triton")
    if missing:
        raise ConfigError(option, f"=true needs {' and '.join(missing)}; install it, or set it to false")


def compile_blocks(model: nn.Module) -> None:
    """Have torch compile each of ``model.sharding_units`` by itself when it is first called, in place.

    Of a MoE layer without a capacity nothing is compiled, as how many rows there are changes with every step: it is the
    one place where the graph of a block is broken.
    """
    for unit in model.sharding_units:  # type: ignore[union-attr]
        unit.compile()


@contextmanager
def compiled_blocks(model: nn.Module) -> Iterator[None]:
    """`compile_blocks` while entered. What was compiled is kept for the next time."""
    units: list[nn.Module] = list(model.sharding_units)  # type: ignore[arg-type]
    before = [unit._compiled_call_impl for unit in units]
    compile_blocks(model)
    try:
        yield
    finally:
        for unit, call in zip(units, before, strict=True):
            unit._compiled_call_impl = call
