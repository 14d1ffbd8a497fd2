"""Training of an autoencoder from a config, and its export in diffusers' layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from dit_moe import checkpoint, config
from dit_moe.autoencoders.autoencoder import Autoencoder, AutoencoderConfig
from dit_moe.autoencoders.base import from_uint8, to_uint8
from dit_moe.autoencoders.kl import (
    MADE_BY,
    KLLoss,
    KLNetwork,
    export,
    reconstruction_errors,
    require_own_export,
)
from dit_moe.autoencoders.reconstructions import reconstruct, reconstruction_grid, shown_images
from dit_moe.config import ConfigError, section
from dit_moe.data import DATASETS, Dataset
from dit_moe.data.held_out import require_held_out
from dit_moe.distributed import join_processes, locked, on_main
from dit_moe.experiments.autoencoder import AutoencoderSettings
from dit_moe.experiments.image import with_fingerprint
from dit_moe.files import require_writable, write_atomically
from dit_moe.pictures import save_png
from dit_moe.plugins import asked, require_loaded
from dit_moe.randomness import BatchRandom
from dit_moe.tasks import Report
from dit_moe.training import Hook, Trainer
from dit_moe.training.curves_of_runs import CurvesPicture
from dit_moe.training.run_start import open_start, require_own_run

SPLITS = ("train", "heldout")
EXPORTED = "autoencoder"  # in the run folder, unless another place is named
RECONSTRUCTIONS = "reconstructions.png"  # in the run folder: held-out images beside what became of them


@dataclass(frozen=True, kw_only=True)
class AutoencoderTraining(AutoencoderSettings):
    """One training of an autoencoder."""

    data: Annotated[Any, DATASETS]
    plugins: tuple[str, ...] = field(default_factory=asked)  # modules of the user's that it needs


def train_and_export(
    settings: AutoencoderTraining, images: dict[str, Dataset], run: Path, out: Path | None = None
) -> Report | None:
    """Train in the run folder `run`, or go on there, and export to the folder `out`, by default one in `run`.

    Args:
        settings, images: as `prepare` returns them.

    Returns what was exported and how well it reconstructs; None on all processes but the main one. ValueError, before
    the training, if something of others lies at `out`.
    """
    out, stated = out or run / EXPORTED, out is not None
    on_main(lambda: require_own_export(out))
    on_main(lambda: require_own_run(run, [RECONSTRUCTIONS]))
    if stated:
        on_main(lambda: require_writable(out))
    report: Report = {}

    def export_network() -> None:
        export(averaged(settings, images["train"], run), images["train"], out)
        versions = {name: version(name) for name in ("dit_moe", "torch", "diffusers")}
        stage = exported(out)
        report.update(describe(stage, images), config=config.dump(settings), versions=versions)
        write_atomically(out / MADE_BY, json.dumps(report, indent=1) + "\n")
        originals = shown_images(_not_trained_on(images))
        save_png(reconstruction_grid(originals, reconstruct(stage, originals)), run / RECONSTRUCTIONS)

    with locked(run), locked(out.parent, out.name):
        train(settings, images, run)
        on_main(export_network)
    return report or None


def prepare(path: Path, overrides: Sequence[str]) -> tuple[AutoencoderTraining, dict[str, Dataset]]:
    """The resolved config, and its images: "train" and, if the data has any, "heldout". ValueError for any mistake."""
    tree = config.load(path, overrides)
    require_loaded(tree)
    return open_images(config.build(AutoencoderTraining, tree))


def open_images(settings: AutoencoderTraining) -> tuple[AutoencoderTraining, dict[str, Dataset]]:
    """`prepare` of a config that is typed."""
    splits = SPLITS if getattr(settings.data, "heldout", True) is not None else SPLITS[:1]
    with section("data"):
        images: dict[str, Dataset] = {split: DATASETS.build(settings.data, split) for split in splits}
        if "images" not in images["train"].__getitems__([0]):
            name = DATASETS.name_of(settings.data)
            raise ConfigError("name", f"={name} holds latents; name a data set of images")
        if "heldout" in images:
            require_held_out(images["train"], images["heldout"])
            trained, found = (each.image_shape for each in images.values())
            if trained != found:
                shown = " and of ".join("×".join(map(str, shape)) for shape in (found, trained))
                problem = (
                    f" images and those that are trained on have other shapes, of {shown} (channels, height, width)"
                )
                raise ConfigError("heldout", f"{problem}; make them equal, or set heldout=null")
    return replace(settings, data=with_fingerprint(settings.data, images["train"].fingerprint)), images


def _not_trained_on(images: dict[str, Dataset]) -> Dataset:
    """The held-out images, if there are any."""
    return images.get("heldout", images["train"])


def train(settings: AutoencoderTraining, images: dict[str, Dataset], folder: Path) -> None:
    """Train into the run folder `folder`, from its newest checkpoint if it has one."""
    dataset, originals = images["train"], shown_images(_not_trained_on(images))
    torch.manual_seed(settings.seed)  # the weights' initialisation is the only use of the global generator
    with section("autoencoder"):
        model = KLNetwork(settings.autoencoder.build(dataset.image_shape))
    with section("loss"):
        objective = KLLoss(settings.loss)

    def prepare_batch(rows: dict[str, Tensor], random: BatchRandom) -> dict[str, Tensor]:
        return {"images": from_uint8(rows["images"])}

    def save_reconstructions(step: int, network: Any) -> dict[str, Path] | None:
        if not join_processes().is_main_process:
            return None
        pixels = from_uint8(originals.to(network.autoencoder.device))
        decoded = to_uint8(network.autoencoder(pixels).sample).cpu()
        path = folder / "samples" / f"step_{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        save_png(reconstruction_grid(originals, decoded), path)
        return {"reconstructions": path}

    start = open_start(settings.train, folder)
    every = settings.train.sample_every
    Trainer(
        settings.train,
        model=model,
        objective=objective,
        dataset=dataset,
        prepare_batch=prepare_batch,
        run=folder,
        config_yaml=config.to_yaml(settings),
        config_class=type(settings),
        seed=settings.seed,
        start=start,
        hooks=[Hook(every=every, call=save_reconstructions)] if every else [],
        curves=CurvesPicture(folder),
    ).train()


def averaged(settings: AutoencoderTraining, images: Dataset, folder: Path) -> Any:
    """The network of the run's newest checkpoint, with the averaged weights."""
    saved = checkpoint.open_checkpoint(folder)
    model = KLNetwork(settings.autoencoder.build(images.image_shape))
    checkpoint.load_into(model, saved.weights("ema"), saved.folder)
    return model.to(join_processes().device).eval().autoencoder


def exported(folder: Path) -> Autoencoder:
    """What was exported to `folder`, and nothing else of its name."""
    return Autoencoder(AutoencoderConfig(model=str(folder.resolve()))).to(join_processes().device)


def describe(stage: Autoencoder, images: dict[str, Dataset]) -> dict[str, Any]:
    """What was exported, and the errors of its reconstructions of the images; null where there are no held-out ones."""
    facts = stage.resolved()
    assert facts.shift is not None and facts.scale is not None
    errors = {split: reconstruction_errors(stage, images[split]) if split in images else None for split in SPLITS}
    return {
        "sha256": facts.sha256,
        "latent_shape": stage.latent_shape(images["train"].image_shape),
        "parameters": sum(parameter.numel() for parameter in stage.parameters()),
        "shift": facts.shift[0],
        "scale": facts.scale[0],
    } | errors
