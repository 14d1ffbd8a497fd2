"""Fully sharded data parallelism (FSDP2): every process keeps a slice of each weight, gradient, moment and average.

Weights stay in fp32 and are gathered in fp32, so that the run is that of one process within float error.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard


def shard(model: nn.Module, device: torch.device, processes: int, *, keep: bool = False) -> None:
    """Cut the weights of `model` up over all processes, in place; those on the CPU reach the device unit by unit.

    Args:
        model: its ``sharding_units`` are gathered one at a time, what is outside of them for the whole pass.
        keep: what was gathered stays so (see `unsharded`). By default a unit is let go of after each pass through it.
    """
    mesh = init_device_mesh(device.type, (processes,))
    # torch keeps meshes to the very end, and with their groups gloo's threads (see `processes.join_processes`). The
    # attribute is private to torch; test_two_processes notices if it goes.
    atexit.register(getattr(mesh, "_pg_registry", {}).clear)
    units: list[nn.Module] = [*model.sharding_units, model]  # type: ignore[misc]
    for unit in units:
        fully_shard(
            unit,
            mesh=mesh,
            reshard_after_forward=False if keep else None,
            shard_placement_fn=lambda parameter: placement(parameter.shape, processes),
        )


def placement(shape: Sequence[int], processes: int) -> Shard | None:
    """The dimension to cut stacked experts along if there is no equal number of them for each process.

    Cut along the experts, 8 of them would leave 8 of 16 processes empty-handed. None is FSDP2's default, the first one.
    """
    if len(shape) < 3:
        return None
    even = [dim for dim, size in enumerate(shape) if size % processes == 0]
    return Shard(even[0]) if even else None


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """While entered, each process holds all weights of a model sharded with `keep`, if it is sharded at all.

    Gathering is done together, computing no longer is: a process may then call the model as often as it likes.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's slice of a sharded tensor, in the same memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
