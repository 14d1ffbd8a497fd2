"""A trained run as the start of one with experts, with other experts, or of other data: `dit-moe upcycle`."""

# N tokens, S tokens of a sample, D width, E experts

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_moe import checkpoint, config
from dit_moe.config import ConfigError, Tree
from dit_moe.data.listing import note
from dit_moe.evaluation.heldout_loss import HeldoutConfig
from dit_moe.evaluation.own_extractor import FOLDER as EXTRACTOR
from dit_moe.experiments.run import Run
from dit_moe.files import require_replaceable
from dit_moe.models import MODELS
from dit_moe.models.base import Transformer
from dit_moe.models.upcycling import Method, add_noise, layout_of, require_upcyclable, scale_experts, upcycle_block
from dit_moe.moe import calibrate, observe_routers, routers_of
from dit_moe.moe.routing import Routing
from dit_moe.tasks import AnyExperiment, Report, task_of
from dit_moe.tasks.image_export import require_averaged, write_run
from dit_moe.tasks.train import prepare
from dit_moe.training.data_loader import Prefetcher
from dit_moe.training.run_start import with_classes
from dit_moe.training.step import training_loss

OF_DATA = ("in_channels", "input_size", "num_classes", "max_length")  # fields of a model
HELDOUT = HeldoutConfig(images=512, draws=4)
TOKENS = 4096  # of each block, on which units are clustered and routers fitted
NOISE = 0.01  # of copied experts
PASSES = 2  # the tokens of a later layer depend on the experts before it
ROUNDING = 1e-4  # of a sum of gates

RunBatch = Callable[[nn.Module], object]


@dataclass(frozen=True, kw_only=True)
class UpcycleOptions:
    """The options of `dit-moe upcycle`."""

    name: str | None = None  # of the model; None: the run's
    router: str | None = None  # None: that of the run, or the default one if it has no experts
    method: Method = "split"
    noise: float | None = None  # see `add_noise`; None: `NOISE` for copies, else none

    def __post_init__(self) -> None:
        if self.noise is not None and not 0 <= self.noise < math.inf:
            raise ConfigError("--noise", f"={self.noise:g} must be a finite number from 0 on; {NOISE:g} is usual")

    @property
    def noise_share(self) -> float:
        return self.noise if self.noise is not None else NOISE if self.method == "copy" else 0.0


@dataclass(frozen=True)
class _Made(checkpoint.Checkpoint):
    """What is to be written, in the form of a checkpoint."""

    tensors: checkpoint.Weights

    def weights(self, part: checkpoint.Part) -> checkpoint.Weights:
        return self.tensors


def upcycle(path: Path, options: UpcycleOptions, changes: Sequence[str], out: Path) -> Report:
    """Write a run folder whose model starts from the averaged weights of a run.

    Args:
        path: a run folder, a checkpoint folder, or weights of another suite.
        changes: ``key=value``, to the config of the run; its own autoencoder, too, is where they say.
        out: the folder to make.

    Returns what was made and how far it is from its source on held-out data, JSON-ready. ValueError for bad input,
    before anything is written.
    """
    require_replaceable(out)
    task = task_of(path)
    source = task.open_run(path, [each for each in changes if each.startswith("first_stage.")])
    experiment, dataset = prepare(_experiment_of(source, options, changes))
    require_averaged(experiment)
    _require(source, experiment, options.method)
    parts = task.training_parts(_without_hooks(experiment), dataset, source.home, None)
    prefetcher = Prefetcher(experiment.train, dataset, parts.prepare_batch, experiment.seed)
    prefetcher.start(0, 1)
    prefetcher.check()

    def run_batch(model: Any) -> None:
        with torch.no_grad():
            for each in prefetcher.ready:
                training_loss(model, parts.objective, each.batch, each.random(), model.aux_weights)

    torch.manual_seed(experiment.seed)
    base, done = _on_new_data(source, experiment, parts.facts.get("class_names"))
    if done:
        note(done)
    made = replace(base, experiment=experiment, model=_with_experts(base, experiment, options, run_batch))
    report: Report = {
        "run": str(source.folder),
        "step": source.step,
        "model": experiment.model.name,
        "method": options.method,
        "parameters": experiment.model.footprint().total_params,
        "active_parameters": experiment.model.footprint().active_params,
        **_deviation(base, made),
    }
    state = {**parts.facts, "step": 0, "files": {}, "upcycled": report}

    def add(unfinished: Path) -> None:
        task.training_parts(_without_hooks(experiment), dataset, unfinished, None).keep_inputs()
        if (source.home / EXTRACTOR).is_dir() and _same_images(source.experiment, experiment):
            shutil.copytree(source.home / EXTRACTOR, unfinished / EXTRACTOR)

    sha256 = write_run(_Made(out, state, checkpoint.state_of(made.model)), experiment, "ema", out, add)
    return {"folder": str(out), **report, "weights_sha256": sha256}


# ---------------------------------------------------------------------------------------------------------- the config


def _experiment_of(source: Run, options: UpcycleOptions, changes: Sequence[str]) -> AnyExperiment:
    """That of the run, with the model that is asked for; what follows from the data is left open."""
    tree, was = config.dump(source.experiment), source.experiment.model
    model: Tree = {key: value for key, value in tree["model"].items() if key not in OF_DATA}
    tree["model"], tree["train"] = model, tree["train"] | {"init_from": None}
    tree["sample"] |= {"weights": "ema", "target": None, "p": None}
    if options.name not in (None, was.name):
        model["name"] = options.name
        moe = {key: value for key, value in (model.pop("moe", None) or {}).items() if key not in ("experts", "target")}
        if was.moe is None:
            moe["bias"] = any(map(_has_biases, _blocks(source.model)))
        if options.method == "copy":
            moe["expert_hidden"] = was.need("mlp_hidden") if was.moe is None else was.expert_hidden
        model["moe"] = moe
    if options.router is not None:
        model["moe"] = (model.get("moe") or {}) | {"router": options.router}
    return task_of(tree).build_experiment(config.override(tree, changes))


def _require(source: Run, experiment: Any, method: Method) -> None:
    """ConfigError unless the run's feed-forwards can become the experts of `experiment` by the method, exactly."""
    was, now = source.experiment.model, experiment.model
    require_upcyclable(was, now)
    for i, block in enumerate(_blocks(source.model)):
        if not now.has_experts(i):
            continue
        if _has_biases(block) and not now.moe.bias:
            raise ConfigError("model.moe.bias", "=False drops the biases of the run's feed-forwards; set it to true")
        if method == "copy" and layout_of(was, now, i).parts > 1:
            problem = f"=copy makes experts as wide as a feed-forward, and model.moe.expert_hidden={now.expert_hidden}"
            raise ConfigError("--method", f"{problem}; drop that, or choose split")


def _blocks(model: Any) -> nn.ModuleList:
    return model.blocks


def _has_biases(block: Any) -> bool:
    feed_forward: nn.Module = block.mlp if block.moe is None else block.moe.experts
    return any("bias" in name for name, _ in feed_forward.named_parameters())


def _same_images(was: Any, now: Any) -> bool:
    """Whether a network that learned from the images of one experiment has learned from those of the other."""

    def identity(images: Any) -> tuple[type, Tree]:
        elsewhere = {"path"} if getattr(images, "fingerprint", None) is not None else set()
        return type(images), {key: value for key, value in vars(images).items() if key not in elsewhere}

    return identity(was.images) == identity(now.images)


def _without_hooks(experiment: Any) -> Any:
    """With nothing to do during a training."""
    train, evaluation = replace(experiment.train, sample_every=None), replace(experiment.eval, light_every=None)
    return replace(experiment, train=train, eval=evaluation)


# --------------------------------------------------------------------------------------------------------- the weights


def _on_new_data(source: Run, experiment: Any, class_names: Sequence[str] | None) -> tuple[Run, str]:
    """The run with the classes and the input size of `experiment`, whose data it can read; and what was done, in words.

    Rows of the label table go by the names of classes, and position embeddings are interpolated.
    """
    was, now = source.experiment.model, experiment.model
    before = getattr(source, "class_names", None)
    shape = replace(was, **{field: getattr(now, field) for field in OF_DATA if hasattr(was, field)})
    if shape == was and (class_names is None or before == list(class_names)):
        return source, ""
    model: Transformer = MODELS.build(shape)
    own, weights = checkpoint.state_of(model), checkpoint.state_of(source.model)
    weights, done = with_classes(model, weights, before, class_names, source.folder)
    table = getattr(model, "position_table", None)
    if table in weights and table in own and weights[table].shape != own[table].shape:
        weights[table] = _resampled(weights[table], own[table])
    checkpoint.load_into(model, weights, source.folder)
    device = next(source.model.parameters()).device
    return replace(source, experiment=replace(experiment, model=shape), model=model.to(device).eval()), done


def _resampled(table_1SD: Tensor, like_1SD: Tensor) -> Tensor:
    """A table of positions on a square, interpolated to another number of them."""
    from timm.layers import resample_abs_pos_embed  # here, as importing timm takes seconds

    side = math.isqrt(like_1SD.shape[1])
    return resample_abs_pos_embed(table_1SD, [side, side], num_prefix_tokens=0)


def _with_experts(base: Run, experiment: Any, options: UpcycleOptions, run_batch: RunBatch) -> Transformer:
    """The model of `experiment` with the weights of `base`, and the hidden units of its feed-forwards as experts."""
    network: Any = base.model
    model: Any = MODELS.build(experiment.model)
    own, weights = checkpoint.state_of(model), checkpoint.state_of(network)
    layers = {i: block.moe for i, block in enumerate(model.blocks) if block.moe is not None}
    places = tuple(f"blocks.{i}.{part}." for i in layers for part in ("mlp", "moe"))
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(places)}
    weights |= {name: tensor for name, tensor in own.items() if name.startswith(places)}
    checkpoint.load_into(model, weights, base.folder)
    inputs, gates, kept = _inputs(network, run_batch), _gates(network, run_batch), True
    for i, layer in layers.items():
        old = network.blocks[i].mlp if network.blocks[i].moe is None else network.blocks[i].moe
        layout = layout_of(base.experiment.model, experiment.model, i)
        kept &= upcycle_block(layer, old, layout, options.method, inputs[i], gates[i])
        if options.noise_share:
            add_noise(layer.experts, options.noise_share)
    model.to(next(network.parameters()).device).eval()
    if kept:
        return model
    sums = defaultdict[int, float](lambda: 1.0)  # of a token's gates beside those before, for which experts are scaled
    for _ in range(PASSES):
        calibrate(model, lambda: run_batch(model))
        for i, gate_E in _gates(model, run_batch).items():
            now = (gate_E.sum() / gates[i].sum()).item()
            if abs(now / sums[i] - 1) > ROUNDING:
                scale_experts(model.blocks[i].moe, sums[i] / now)
                sums[i] = now
    calibrate(model, lambda: run_batch(model))
    return model


def _inputs(model: Any, run_batch: RunBatch) -> list[Tensor]:
    """Of each block's feed-forward, or MoE layer: at most `TOKENS` tokens, evenly spaced, [N, D] in fp32."""
    seen: list[list[Tensor]] = [[] for _ in model.blocks]

    def spaced(x_ND: Tensor) -> Tensor:
        return x_ND[:: max(1, len(x_ND) // TOKENS)][:TOKENS]

    def hook(i: int) -> Callable[..., None]:
        return lambda module, args: seen[i].append(spaced(args[0].flatten(0, -2)).float().cpu())

    parts = [block.mlp if block.moe is None else block.moe for block in model.blocks]
    handles = [part.register_forward_pre_hook(hook(i)) for i, part in enumerate(parts)]
    try:
        run_batch(model)
    finally:
        for handle in handles:
            handle.remove()
    return [spaced(torch.cat(each)) for each in seen]


def _gates(model: Any, run_batch: RunBatch) -> dict[int, Tensor]:
    """By block: the mean over tokens of each expert's gate, [E]; of a block without experts [1]."""
    blocks = [i for i, block in enumerate(model.blocks) if block.moe is not None]
    sums, tokens = defaultdict[int, Any](int), defaultdict[int, int](int)

    def add(layer: int, x_ND: Tensor, routing: Routing) -> None:
        gate_E = torch.zeros(len(routing.counts_E), device=x_ND.device)
        sums[blocks[layer]] += gate_E.index_add_(0, routing.expert_R, routing.weight_R.detach())
        tokens[blocks[layer]] += len(x_ND)

    with observe_routers(routers_of(model), add):
        run_batch(model)
    dense = {i: torch.ones(1) for i in range(len(model.blocks)) if i not in blocks}
    return dense | {i: gate_E.cpu() / tokens[i] for i, gate_E in sums.items()}


# ------------------------------------------------------------------------------------------------------- the deviation


def _deviation(base: Run, made: Run) -> Report:
    """The held-out loss of both, and the norm of the difference between their outputs in that of the outputs."""
    task = task_of(made.experiment)
    try:
        task.require_heldout(made.experiment)
    except ValueError as error:
        note(f"how far the model is from its source is not measured: {error}")
        return {}
    source = replace(
        base, experiment=replace(made.experiment, model=base.experiment.model)
    )  # on the same held-out data
    apart, size = 0.0, 0.0

    def compare(model: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        nonlocal apart, size
        wanted = base.model(*args, **kwargs)
        apart += (output - wanted).square().sum().item()
        size += wanted.square().sum().item()

    with made.model.register_forward_hook(compare, with_kwargs=True):
        found = task.heldout_loss(made, HELDOUT)
    return {
        "heldout_loss": found.loss,
        "heldout_loss_of_source": task.heldout_loss(source, HELDOUT).loss,
        "output_difference": math.sqrt(apart / size),
        "active_experts": found.active,
    }
