"""A trained model of images as a pipeline of diffusers.

    pipe = DiTMoEPipeline.from_pretrained("exported/digits")
    images = pipe(["7", 2], seed=0).images

`dit-moe export --to diffusers` writes its folder. A program that does not import this package, but runs where it is
installed, opens that by `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.
"""

# B images of a call, C channels, H height, W width

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from huggingface_hub import snapshot_download
from torch import Tensor

from dit_moe import config
from dit_moe.autoencoders import FIRST_STAGES, FirstStage
from dit_moe.autoencoders.autoencoder import Autoencoder, AutoencoderConfig, normalization_of
from dit_moe.autoencoders.base import Identity
from dit_moe.autoencoders.own_copy import copy_statistics, with_own_copy
from dit_moe.config import ConfigError, Tree, section
from dit_moe.diffusion import Flow
from dit_moe.diffusion.guidance import GuidedNetwork
from dit_moe.downloads import FILES
from dit_moe.experiments.run import ImageRun
from dit_moe.files import write_atomically
from dit_moe.interop.pipeline_parts import DiTMoEScheduler, DiTMoETransformer2DModel
from dit_moe.pictures import picture
from dit_moe.randomness import generator as generator_of
from dit_moe.randomness import normal_like_images
from dit_moe.sampling.generator import SampleConfig
from dit_moe.sampling.labels import listed_classes, plain_labels

PARTS = {"transformer": DiTMoETransformer2DModel, "scheduler": DiTMoEScheduler}
CODE = "pipeline"  # the file of the folder, and of those of PARTS, that programs load with trust_remote_code=True
CARD = "README.md"
DEFAULT_STEPS = 50  # of a scheduler of diffusers


@dataclass(frozen=True, kw_only=True)
class _FirstStageSection:
    first_stage: Annotated[Any, FIRST_STAGES]


class DiTMoEPipeline(DiffusionPipeline):
    """Images of classes; its arguments beside the parts are those of the run's config.

    Args:
        vae: None where the model makes pixels.
        class_names: in the order of the label table; None: not known.
        sample: the section `sample`; the scheduler does what its sampler says.
        first_stage: the section `first_stage`, whose weights are `vae`; None: it scales latents as `vae` itself says.
    """

    model_cpu_offload_seq = "transformer->vae"  # type: ignore[assignment]
    _optional_components = ["vae"]  # noqa: RUF012 (the base class's own type)
    transformer: Any  # a DiTMoETransformer2DModel, perhaps compiled or offloaded
    scheduler: Any  # a DiTMoEScheduler, or one of diffusers
    vae: Any

    def __init__(
        self,
        transformer: DiTMoETransformer2DModel,
        scheduler: DiTMoEScheduler,
        vae: Any = None,
        class_names: list[str] | None = None,
        sample: Tree | None = None,
        first_stage: Tree | None = None,
    ) -> None:
        super().__init__()
        if vae is not None and first_stage is None:
            shift, scale = normalization_of(vae.config)
            described = AutoencoderConfig(model="vae", kind=type(vae).__name__, shift=shift, scale=scale)
            first_stage = config.dump(_FirstStageSection(first_stage=described))["first_stage"]
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(class_names=class_names, sample=sample, first_stage=first_stage)
        self._guidance = config.build(SampleConfig, sample or {}, "sample").guidance

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Iterable[int | str],
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        *,
        seed: int | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """An image for each label.

        Args:
            class_labels: classes by name or number.
            guidance_scale: 1 is none; None: as the run's config says.
            num_inference_steps: None: as the run's config says.
            generator: one for all images, or one for each; None: torch's global one.
            seed: in place of `generator`: the draws of the first images that `dit-moe sample` makes with this seed.
            output_type: pictures; arrays [B, H, W, C] or tensors [B, C, H, W] in [0, 1]; latents [B, C, H, W].

        Raises ValueError for a class that there is not, or a setting that cannot work.
        """
        labels_B, architecture = self.class_rows(class_labels), self.transformer.architecture
        generators = _generators(len(labels_B), generator, seed)
        with section("guidance"):
            scale = self._guidance.scale if guidance_scale is None else guidance_scale
            guidance = replace(self._guidance, scale=scale)
        device, side = self._execution_device, architecture.input_size
        x = normal_like_images(generators, (architecture.in_channels, side, side), device)
        guided = GuidedNetwork(self._network, labels_B.to(device), architecture.num_classes, guidance)
        times = self._times(num_inference_steps, device)
        x = x * getattr(self.scheduler, "init_noise_sigma", 1)
        for t, network_time, time in self.progress_bar(times):
            scaled = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            x = self._step(guided(scaled, network_time, time), t, x, generators)
        images = x if output_type == "latent" else self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)  # type: ignore[arg-type]

    def class_rows(self, class_labels: int | str | Iterable[int | str]) -> Tensor:
        """The rows of the label table, int64 [B], of classes by name or number. ValueError if there is none such."""
        with section("class"):
            asked = plain_labels(class_labels)
            listed = SampleConfig(labels=asked if isinstance(asked, tuple) else (asked,))  # no word means all classes
            rows = listed_classes(listed, self.transformer.architecture.num_classes, self.config["class_names"])
        return torch.tensor(rows)

    def _network(self, x: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
        return self.transformer(x.to(self.transformer.dtype), t_B, labels_B, return_dict=False)[0]

    def _times(self, steps: int | None, device: torch.device) -> list[tuple[Tensor, float, float]]:
        """The scheduler's time of each evaluation, what the network is told then, and its place in [0, 1]."""
        scheduler, objective = self.scheduler, self.transformer.objective
        if isinstance(scheduler, DiTMoEScheduler):
            scheduler.set_timesteps(steps, device)
            return [(t, t.item(), time) for t, time in zip(scheduler.timesteps, scheduler.times, strict=True)]
        steps = DEFAULT_STEPS if steps is None else steps
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters and isinstance(objective, Flow):
            scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)], device=device)
        else:
            scheduler.set_timesteps(steps, device=device)
        places = [(t, t.item() / scheduler.config.num_train_timesteps) for t in scheduler.timesteps]
        flows = isinstance(objective, Flow)
        return [(t, objective.network_time(time) if flows else t.item(), time) for t, time in places]

    def _step(self, output: Tensor, t: Tensor, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        if not isinstance(self.scheduler, DiTMoEScheduler):  # they know no learned variance, and flow towards noise
            sign = self.transformer.objective.sign if isinstance(self.transformer.objective, Flow) else 1
            output = sign * output[:, : x.shape[1]]
        takes = inspect.signature(self.scheduler.step).parameters
        given = {"generator": generators} if "generator" in takes else {}
        return self.scheduler.step(output, t, x, **given, return_dict=False)[0]

    def _decode(self, latents_BCHW: Tensor, output_type: str) -> Any:
        images_BCHW = self.first_stage().decode(latents_BCHW).cpu()
        if output_type == "pt":
            return images_BCHW / 255
        images_BHWC = images_BCHW.permute(0, 2, 3, 1).numpy()
        return images_BHWC / 255 if output_type == "np" else list(map(picture, images_BHWC))

    def first_stage(self) -> FirstStage:
        """What decodes the latents, with the pipeline's `vae`."""
        described = {"first_stage": self.config["first_stage"] or {"name": "identity"}}
        section = config.build(_FirstStageSection, described).first_stage
        stage: Any = FIRST_STAGES.build(section if self._folder is None else with_own_copy(section, self._folder))
        stage.to(self._execution_device)  # which says where its precision counts
        if self.vae is not None:
            stage.network = self.vae
        return stage

    @property
    def _folder(self) -> Path | None:
        """That it was opened from."""
        return Path(self.name_or_path) if self.name_or_path else None

    # ------------------------------------------------------------------------------------------------- the folder

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As in diffusers, but no code of the folder or the repository is run: this package has its classes."""
        place = str(pretrained_model_name_or_path)
        if not os.path.isdir(place):
            where = {
                key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs
            }
            place = snapshot_download(place, allow_patterns=list(FILES), **where)
        return super().from_pretrained(place, **kwargs)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, with the classes of this package in place of those that the folder's code names."""
        loaded = super().load_config(*args, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        index["_class_name"] = cls.__name__
        for part, own in PARTS.items():
            if part in index and index[part][0] == CODE:
                index[part] = [own.__module__, own.__name__]
        return loaded

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in diffusers, with the code that `trust_remote_code=True` loads, and the model card if there is one."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text(encoding="utf-8"))
        index["_class_name"] = [CODE, type(self).__name__]
        _write_code(folder, type(self))
        for part, own in PARTS.items():
            if index[part][0] == own.__module__:
                index[part][0] = CODE
                _write_code(folder / part, own)
        write_atomically(folder / self.config_name, json.dumps(index, indent=2) + "\n")
        copy_statistics(self.first_stage().config, folder)
        self._keep_card(folder)

    def _upload_folder(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        self._keep_card(Path(working_dir))  # which diffusers has replaced by an empty one
        return super()._upload_folder(working_dir, *args, **kwargs)

    def _keep_card(self, folder: Path) -> None:
        card = None if self._folder is None else self._folder / CARD
        if card is not None and card.is_file() and card.parent.resolve() != folder.resolve():
            shutil.copyfile(card, folder / CARD)


def wrap(run: ImageRun) -> DiTMoEPipeline:
    """A run in memory as a pipeline, without a copy. ConfigError for a sampler or first stage that it cannot have."""
    experiment, generator = run.experiment, run.generator()
    stage = generator.stage
    if not isinstance(stage, Autoencoder | Identity):
        problem = f": a pipeline has an autoencoder of diffusers or none, and {type(stage).__name__} is neither"
        raise ConfigError("first_stage", f"{problem}; save the run as a run folder")
    first_stage = stage.config
    if isinstance(stage, Autoencoder):
        stage.load()
        first_stage = replace(stage.config, model="vae", subfolder=None)
    budget = None if generator.budget is None else [list(each) for each in generator.budget.overrides_PL]
    return DiTMoEPipeline(
        transformer=DiTMoETransformer2DModel.wrap(run.model, experiment.model, experiment.objective, budget),
        scheduler=DiTMoEScheduler.of(generator.sampler, generator.latent_shape),
        vae=stage.network if isinstance(stage, Autoencoder) else None,
        class_names=run.class_names,
        sample=config.dump(experiment.sample),
        first_stage=config.dump(_FirstStageSection(first_stage=first_stage))["first_stage"],
    )


def _write_code(folder: Path, cls: type) -> None:
    line = f"from {cls.__module__} import {cls.__name__}  # noqa: F401\n"
    write_atomically(folder / f"{CODE}.py", line)


def _generators(
    count: int, generator: torch.Generator | list[torch.Generator] | None, seed: int | None
) -> list[torch.Generator]:
    """One for each image."""
    if seed is not None and generator is not None:
        raise ValueError("seed and generator exclude each other; drop one")
    if seed is not None:
        return [generator_of(seed, "image", i) for i in range(count)]
    if isinstance(generator, list):
        if len(generator) != count:
            raise ValueError(f"generator has {len(generator)} entries for {count} images; give one for each, or one")
        return generator
    return [generator or torch.default_generator] * count
