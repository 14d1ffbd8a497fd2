"""A dense run as diffusers' own `DiTPipeline`, which needs none of our code."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from dit_moe.autoencoders.autoencoder import Autoencoder
from dit_moe.checkpoint import Checkpoint
from dit_moe.config import ConfigError
from dit_moe.data.class_names import or_imagenet, words_of
from dit_moe.diffusion import SAMPLERS
from dit_moe.experiments.run import ImageRun
from dit_moe.formats import in_format
from dit_moe.interop.pipeline_parts import in_words_of_diffusers

NULL_LABEL = 1000  # of DiTPipeline
REMEDY = "export it with --to diffusers"


def native_pipeline(run: ImageRun, saved: Checkpoint) -> DiTPipeline:
    """A run, and the checkpoint that it is opened from, as a `DiTPipeline` with DDIM; its network computes the same.

    ConfigError for what that network, or the pipeline around it, computes otherwise.
    """
    model, sample = run.experiment.model, run.experiment.sample
    shape = {
        "num_attention_heads": model.heads,
        "attention_head_dim": model.width // model.heads,
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "num_layers": model.depth,
        "sample_size": model.input_size,
        "patch_size": model.patch_size,
        "num_embeds_ada_norm": model.num_classes,
        "norm_eps": model.mlp_norm_eps,
    }
    weights = in_format("diffusers", saved, sample.weights, shape)
    if model.num_classes != NULL_LABEL:
        problem = f"={model.num_classes}: DiTPipeline takes the label {NULL_LABEL} for no class"
        raise ConfigError("model.num_classes", f"{problem}; {REMEDY}")
    network = DiTTransformer2DModel(**shape).eval()
    network.load_state_dict(weights)
    names = or_imagenet(run.class_names, model.num_classes) or map(str, range(model.num_classes))
    id2label = {row: ", ".join(words_of(name)) for row, name in enumerate(names)}
    pipeline = DiTPipeline(
        transformer=network,
        vae=_autoencoder(run),
        scheduler=DDIMScheduler(**in_words_of_diffusers(SAMPLERS.build(sample.sampler, run.objective))),
        id2label=id2label,
    )
    pipeline.register_to_config(id2label=id2label)  # it does not do so itself, and reads it
    return pipeline


def _autoencoder(run: ImageRun) -> Any:
    """The network that decodes latents, which says itself how they are scaled."""
    stage = run.stage
    kind = getattr(stage.config, "kind", None)
    if not isinstance(stage, Autoencoder) or kind != "AutoencoderKL":
        raise ConfigError(
            "first_stage", f": DiTPipeline needs an AutoencoderKL, and this is {kind or 'none'}; {REMEDY}"
        )
    shift, scale = stage.config.shift, stage.config.scale
    if shift != (0.0,) or scale is None or len(scale) != 1:
        raise ConfigError("first_stage.shift", f"={shift}: DiTPipeline scales all latents alike, and no more; {REMEDY}")
    stage.network.register_to_config(scaling_factor=scale[0], shift_factor=None)
    return stage.network
