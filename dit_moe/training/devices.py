"""Which devices and processes train, in which precision, and what each holds of the model.

With ``train.parallel=fsdp2`` (fully sharded data parallelism) every process keeps a slice of each weight, gradient,
moment and average. Weights stay in fp32 and are gathered in fp32, so that the run is that of one process within float
error.
"""

from __future__ import annotations

import atexit
import os
import resource
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from dit_moe.config import ConfigError
from dit_moe.distributed import has_mps, join_processes, use_cpu
from dit_moe.models.compilation import require_compiler
from dit_moe.training.config import TrainConfig
from dit_moe.training.trackers import require_installed

# What `accelerate launch` or its config file may ask for beside processes and devices, and would get in part or not
# at all: the variable by which it says so, the values by which it asks for nothing, and what says it here.
_OFF, _SPLIT = ("", "0", "false", "no"), "train.parallel says how processes share the model (ddp or fsdp2)"
ASKED = {
    "USE_FSDP": (_OFF, _SPLIT),
    "USE_DEEPSPEED": (_OFF, _SPLIT),
    "USE_MEGATRON_LM": (_OFF, _SPLIT),
    "USE_PARALLELISM_CONFIG": (_OFF, _SPLIT),
    "DYNAMO_BACKEND": (_OFF, "train.compile says whether torch.compile is used"),
    "GRADIENT_ACCUMULATION_STEPS": (
        ("", "1"),
        "train.batch_size says what a step takes, train.micro_batch in which parts",
    ),
}


def require_packages(config: TrainConfig) -> None:
    """ConfigError if this machine lacks the package of a tracker, or what torch.compile needs."""
    require_installed(config.trackers)
    if config.compile:
        require_compiler("cuda" if not use_cpu() and torch.cuda.is_available() else "cpu", "train.compile")


def build_accelerator(config: TrainConfig, run: Path) -> Accelerator:
    """The Accelerator of this process: alone, or one of those that `accelerate launch` or torchrun started.

    Raises ConfigError as `require_packages` does, if the processes cannot work together, or if accelerate is set to do
    what the config decides, or nobody does.
    """
    for name, (nothing, here) in ASKED.items():
        asked = os.environ.get(f"ACCELERATE_{name}", "")
        if asked.lower() not in nothing:
            raise _refused(name, asked, here)
    require_packages(config)
    join_processes()
    cpu = use_cpu()
    has_bf16 = not cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = (
        "bf16" if config.mixed_precision == "auto" and has_bf16 else config.mixed_precision.replace("auto", "fp32")
    )
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "")
    if asked.lower() not in (*_OFF, precision):  # `no` is also what accelerate launch says when nobody has asked
        raise _refused(
            "MIXED_PRECISION", asked, f"train.mixed_precision={config.mixed_precision} means {precision} here"
        )
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    # accelerate keeps the first precision for the life of the process; a second run in it may want another.
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=cpu,
        mixed_precision=precision.replace("fp32", "no"),
        project_dir=run,
        # Buffers stay each process's own: those that must agree are computed from sums over all processes.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )


def _refused(name: str, asked: str, here: str) -> ConfigError:
    remedy = f"launch without --{name.lower()} and with a config file that does not name it"
    return ConfigError(f"ACCELERATE_{name}", f"={asked}, but {here}; {remedy}")


def remarks() -> list[str]:
    """What the environment says of this machine's devices and processes that may not be what its user means."""
    said, hidden, tasks = [], os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if hidden is not None and torch.version.cuda and not torch.accelerator.is_available():
        said.append(f"CUDA_VISIBLE_DEVICES={hidden} leaves no GPU to train on: this trains on the CPU")
    if has_mps():
        said.append("this Mac's GPU has no float64, which routers and noise schedules need: this trains on the CPU")
    if tasks != "1" and "WORLD_SIZE" not in os.environ:
        alone = "each of which trains for itself; to train together, let srun start one torchrun on each node"
        said.append(f"srun has started {tasks} processes, {alone}")
    return said


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


def peak_memory() -> int:
    """Bytes that this process has used at most: of its GPU's memory, or where it has none of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB
