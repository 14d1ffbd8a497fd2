"""The parts of `DiTMoEPipeline` as diffusers has them: the network as a model, our samplers as a scheduler."""

# B batch, C channels, H height = width, P parts of the way from noise to data, L MoE layers

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor, nn

from dit_moe import config
from dit_moe.config import ConfigError, Tree
from dit_moe.diffusion import DDPM, OBJECTIVES, SAMPLERS, Objective, Sampler
from dit_moe.diffusion.samplers.base import Steps
from dit_moe.diffusion.samplers.chain import PREDICTION_TYPES
from dit_moe.diffusion.samplers.flow import FlowSampler
from dit_moe.interop.router_precision import RoutersInFP32
from dit_moe.models import MODELS
from dit_moe.moe.compute_budget import Budgets, ComputeBudget


@dataclass(frozen=True, kw_only=True)
class _NetworkSections:
    model: Annotated[Any, MODELS]
    objective: Annotated[Any, OBJECTIVES]


@dataclass(frozen=True, kw_only=True)
class _SamplerSections:
    objective: Annotated[Any, OBJECTIVES]
    sampler: Annotated[Any, SAMPLERS]


class DiTMoETransformer2DModel(RoutersInFP32, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A network of images, dense or with experts, as diffusers calls its transformers.

    Args:
        model, objective: the sections of its run's config.
        compute_budget: thresholds, or k, in place of the trained ones, by part of the way and layer [P][L], as
            `ComputeBudget` has them; None: as trained.
        network: to wrap in place of a new one, not copied.
    """

    ignore_for_config = ["network"]  # noqa: RUF012 (the base class's own type)
    _keep_in_fp32_modules = ["router"]  # type: ignore[assignment]  # noqa: RUF012

    @register_to_config
    def __init__(
        self, model: Tree, objective: Tree, compute_budget: Budgets | None = None, network: nn.Module | None = None
    ) -> None:
        super().__init__()
        sections = config.build(_NetworkSections, {"model": model, "objective": objective})
        self.architecture: Any = sections.model
        self.objective: Objective = OBJECTIVES.build(sections.objective, num_classes=sections.model.num_classes)
        self.network: nn.Module = MODELS.build(sections.model) if network is None else network
        self.compute_budget = None if compute_budget is None else ComputeBudget(self.network, compute_budget)

    @classmethod
    def wrap(cls, network: nn.Module, model: Any, objective: Any, compute_budget: Budgets | None = None) -> Any:
        """A trained network as such a model, without a copy; `model` and `objective` are its typed configs."""
        sections = config.dump(_NetworkSections(model=model, objective=objective))
        return cls(**sections, compute_budget=compute_budget, network=network).eval()

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The prediction [B, C or 2C, H, H] at latents [B, C, H, H], times [B] and labels [B].

        Where a compute budget changes on the way, all images have the time of the first.
        """
        with ExitStack() as stack:
            if self.compute_budget is not None:
                changes = len(self.compute_budget.overrides_PL) > 1
                place = self.objective.place(timestep[0].item()) if changes else 1.0
                stack.enter_context(self.compute_budget.at(place))
            sample = self.network(hidden_states, timestep, class_labels)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class DiTMoEScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A sampler of ours, one evaluation of the network a step. Its numbers are those of `dit-moe sample`.

    Those schedulers of diffusers that fit the objective take its place by their `from_config`.

    Args:
        objective, sampler: the sections of the run's config; the sampler's time shift is a number.
    """

    order = 1
    _compatibles = [  # noqa: RUF012 (the base class's own type)
        *("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
        *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
        *("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    ]

    @register_to_config
    def __init__(self, objective: Tree, sampler: Tree) -> None:
        sections = config.build(_SamplerSections, {"objective": objective, "sampler": sampler})
        self.objective: Objective = OBJECTIVES.build(sections.objective, num_classes=0)
        self._section = sections.sampler
        self.set_timesteps()
        self.register_to_config(**in_words_of_diffusers(self.sampler))

    @classmethod
    def of(cls, sampler: Sampler, latent_shape: Sequence[int]) -> Any:
        """The scheduler that does what `sampler` does to latents [C,H,W]. ConfigError if it takes no single steps."""
        try:
            sampler.network_times(latent_shape)
        except NotImplementedError:
            problem = f"={SAMPLERS.name_of(sampler.config)} makes its steps in one go, and a pipeline takes them singly"
            raise ConfigError("sample.sampler", f"{problem}; choose another, or give it the method _steps") from None
        shift = {"time_shift": sampler.shift(latent_shape)} if isinstance(sampler, FlowSampler) else {}
        section: Any = replace(sampler.config, **shift)  # type: ignore[arg-type]
        return cls(**config.dump(_SamplerSections(objective=sampler.trained.config, sampler=section)))

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None) -> None:
        """Start anew with so many steps; None: with as many as the section `sampler` says.

        `timesteps` is then what the network is told at each evaluation, and `times` its place in [0, 1]; a sampler of
        second order has two evaluations a step. ConfigError for a number of steps that the sampler cannot take.
        """
        steps = {} if num_inference_steps is None else {"steps": num_inference_steps}
        self.sampler: Sampler = SAMPLERS.build(replace(self._section, **steps), self.objective)
        self.num_inference_steps = self.sampler.config.steps
        self.times = self.sampler.times()
        self.timesteps = torch.tensor(self.sampler.network_times(), device=device)
        self._steps: Steps | None = None
        self._asked: Tensor | None = None

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself."""
        return sample

    @torch.no_grad()
    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """What the network is to be evaluated at next or, in the end, the latents, [B, C, H, H].

        Args:
            model_output: the network's, all its channels.
            timestep: taken in order, whatever it says.
            sample: what the step before returned; first, the noise. ValueError for anything else: a sampler also goes
                back to earlier states.
            generator: in the first step, that of all draws; or one for each image.
        """
        if self._steps is None:
            several = isinstance(generator, list)
            generators = generator if several else [generator or torch.default_generator] * len(sample)
            self._steps = self.sampler.evaluate(sample, generators)
            self._asked = next(self._steps).x
        assert self._asked is not None
        if sample is not self._asked and not torch.equal(sample, self._asked):
            raise ValueError(
                "sample is not what the last step returned; pass that, or call set_timesteps to start anew"
            )
        try:
            self._asked = self._steps.send(model_output).x
        except StopIteration as end:
            self._steps, self._asked = None, end.value
        return SchedulerOutput(prev_sample=self._asked) if return_dict else (self._asked,)

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])


def in_words_of_diffusers(sampler: Sampler) -> Tree:
    """The options of diffusers' schedulers that say the same as a sampler and its objective, as far as they can."""
    trained = sampler.trained
    if isinstance(trained, DDPM):
        return {
            "num_train_timesteps": len(trained.schedule),
            "trained_betas": trained.schedule.betas.tolist(),
            "prediction_type": PREDICTION_TYPES[trained.config.prediction],
            "timestep_spacing": "trailing",
            "clip_sample": False,
        }
    shift = sampler.shift(None) if isinstance(sampler, FlowSampler) else 1.0
    return {"num_train_timesteps": 1000, "shift": shift}
