"""Which devices and processes train, in which precision, and what each holds of the model.

With ``train.parallel=fsdp2`` (fully sharded data parallelism) every process keeps a slice of each weight, gradient,
moment and average. Weights stay in fp32 and are gathered in fp32, so that the run is that of one process within float
error.
"""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from dit_moe.config import ConfigError
from dit_moe.distributed import join_processes, use_cpu
from dit_moe.training.config import TrainConfig

PLUGINS = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # accelerate's own ways to split a model, each behind an option


def build_accelerator(config: TrainConfig, run: Path) -> Accelerator:
    """The Accelerator of this process: alone, or one of those that `accelerate launch` or torchrun started.

    Raises ConfigError if a tracker's package is missing, if the processes cannot work together, or if accelerate is
    set to split the model.
    """
    for plugin in PLUGINS:
        if parse_flag_from_env(f"ACCELERATE_USE_{plugin}"):  # its options would be obeyed in part only
            problem = "=true, but train.parallel says how processes share the model (ddp or fsdp2)"
            remedy = f"launch without --use_{plugin.lower()} and with a config file that does not name it"
            raise ConfigError(f"ACCELERATE_USE_{plugin}", f"{problem}; {remedy}")
    for tracker in config.trackers:
        if tracker not in map(str, get_available_trackers()):  # accelerate itself would go on without it
            problem = f"={tracker} needs a package that is not installed; pip install 'dit_moe[{tracker}]'"
            raise ConfigError("train.trackers", problem)
    join_processes()
    cpu = use_cpu()
    has_bf16 = not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = config.mixed_precision == "bf16" or (config.mixed_precision == "auto" and has_bf16)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    # accelerate keeps the first precision for the life of the process; a second run in it may want another.
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=cpu,
        mixed_precision="bf16" if bf16 else "no",
        log_with=list(config.trackers) or None,
        project_dir=run,
        # Buffers stay each process's own: those that must agree are computed from sums over all processes.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )


def place(accelerator: Accelerator, model: nn.Module, config: TrainConfig, *, average: bool = False) -> None:
    """Put `model`, or the `average` of one, on this process's device: all of it, or its slice (``train.parallel``).

    Slices of ``model.sharding_units`` are gathered one unit at a time, what is outside of them for the whole pass. A
    unit is let go of after each pass through it, but that an average, once gathered, stays so (see `unsharded`).
    """
    device, processes = accelerator.device, accelerator.num_processes
    if config.parallel == "ddp" or processes == 1:
        model.to(device)
        return
    mesh = init_device_mesh(device.type, (processes,))
    # torch keeps meshes to the very end, and with their groups gloo's threads (see `distributed.join_processes`). The
    # attribute is private to torch; test_two_processes notices if it goes.
    atexit.register(getattr(mesh, "_pg_registry", {}).clear)
    units: list[nn.Module] = [*model.sharding_units, model]  # type: ignore[misc]
    for unit in units:  # weights on the CPU reach the device unit by unit
        fully_shard(
            unit,
            mesh=mesh,
            reshard_after_forward=False if average else None,
            shard_placement_fn=lambda parameter: placement(parameter.shape, processes),
        )


def wrap(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The network to call in training: autocast around it, gradients averaged over processes."""
    with warnings.catch_warnings():  # torch 2.14 has renamed the option, accelerate knows only its old name
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        sharded = isinstance(model, FSDPModule)  # averages by itself: all that accelerate has to add is autocast
        return accelerator.prepare_model(model, evaluation_mode=sharded)


@contextmanager
def accumulating(accelerator: Accelerator, network: nn.Module) -> Iterator[None]:
    """While entered, backward passes of the wrapped `network` add up gradients without sending them."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            network.set_requires_gradient_sync(True)
    else:
        with accelerator.no_sync(network):
            yield


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
    """While entered, each process holds all weights of an average that `place` sharded, if it did.

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
