"""DiTTransformer2DModel of diffusers: a DiT that computes its times and one of its norms with other constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_moe.config import Tree
from dit_moe.diffusion.samplers.chain import PREDICTION_TYPES
from dit_moe.diffusion.schedules import BETAS, cosine_betas
from dit_moe.formats.base import Found, ImageFormat, NotThisFormat, named_size, register
from dit_moe.formats.rules import NEAR, Rule, computed, copies, joined, same
from dit_moe.formats.sources import read_settings
from dit_moe.models.positions import sincos_position_embedding

ALIKE = {  # linear layers: ours and theirs
    "x_embedder.proj": "pos_embed.proj",
    "blocks.#.adaLN_modulation.1": "transformer_blocks.#.norm1.linear",
    "blocks.#.attn.proj": "transformer_blocks.#.attn1.to_out.0",
    "blocks.#.mlp.fc1": "transformer_blocks.#.ff.net.0.proj",
    "blocks.#.mlp.fc2": "transformer_blocks.#.ff.net.2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
IN_EVERY_BLOCK = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
}
CONSTANT: Mapping[str, Any] = {  # what config.json may say of the computation, and all that our model can follow
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "attention_bias": True,
}
DEFAULTS: Tree = {  # of the schedulers of diffusers
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}


@register("diffusers")
class DiffusersFormat(ImageFormat):
    """A folder of diffusers, or a file from one: the transformer, or the pipeline that it is in."""

    suite: ClassVar[str] = "diffusers"
    recipe: ClassVar[str | None] = "dit-cfg1.5"

    def model(self, found: Found) -> Tree:
        width, channels, patch, _ = found.matrix("pos_embed.proj.weight", 4)
        hidden, _ = found.matrix("transformer_blocks.0.ff.net.0.proj.weight")
        outputs = found.shape("proj_out_2.bias")[0] // patch**2
        classes, _ = found.matrix("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight")
        settings = found.settings
        for key, value in CONSTANT.items():
            if settings.get(key, value) != value:
                raise NotThisFormat(f"config.json has {key}={settings[key]}, and our model only {value}")
        size = named_size(
            found.count("transformer_blocks.#."), width, hidden, patch, settings.get("num_attention_heads")
        )
        return {
            **size,
            "in_channels": channels,
            "num_classes": classes - 1,
            "learn_sigma": outputs == 2 * channels,
            "freq_shift": 1,
            "mlp_norm_eps": float(settings.get("norm_eps", 1e-5)),
            **({"input_size": settings["sample_size"]} if "sample_size" in settings else {}),
        }

    def objective(self, found: Found) -> Tree:
        learned = self.model(found)["learn_sigma"]
        chain = {} if found.folder is None else chain_of(found.folder / "scheduler" / "scheduler_config.json")
        return {"name": "ddpm", "variance": "learned_range" if learned else "fixed_small", **chain}

    def first_stage(self, found: Found) -> Tree:
        if found.folder is not None and (found.folder / "vae" / "config.json").is_file():
            return {"name": "autoencoder", "model": str(found.folder), "subfolder": "vae"}
        return super().first_stage(found)

    def rules(self, model: Any) -> Sequence[Rule]:
        embedding = "transformer_blocks.#.norm1.emb"
        rules = [computed("pos_embed", lambda: sincos_position_embedding(model.need("width"), model.side)[None])]
        for kind in ("weight", "bias"):
            rules += [same(f"{ours}.{kind}", f"{theirs}.{kind}") for ours, theirs in ALIKE.items()]
            rules += [copies(f"{ours}.{kind}", f"{embedding}.{each}.{kind}") for ours, each in IN_EVERY_BLOCK.items()]
            parts = [f"transformer_blocks.#.attn1.to_{part}.{kind}" for part in "qkv"]
            rules.append(joined(f"blocks.#.attn.qkv.{kind}", *parts))
        table = "y_embedder.embedding_table.weight"
        return [*rules, copies(table, f"{embedding}.class_embedder.embedding_table.weight")]


def chain_of(path: Path) -> Tree:
    """What the file of a scheduler says of the training, in the words of our `ddpm`; of no file nothing.

    NotThisFormat for what that has no words for.
    """
    if not path.is_file():
        return {}
    settings = DEFAULTS | read_settings(path)
    if "Flow" in str(settings.get("_class_name")):
        raise NotThisFormat(f"{path} is of a flow, and transformers of diffusers are read as trained by DDPM")
    predictions = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
    prediction, levels = settings["prediction_type"], settings["num_train_timesteps"]
    try:
        schedule = next((name for name, betas in BETAS.items() if _near(betas(levels), settings)), None)
    except (TypeError, ValueError, RuntimeError):  # no numbers
        schedule = None
    if prediction not in predictions or schedule is None or settings["rescale_betas_zero_snr"]:
        names = ("prediction_type", "beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr")
        told = " ".join(f"{name}={settings[name]}" for name in names)
        raise NotThisFormat(f"{path} has {told}, which our ddpm cannot follow")
    return {"prediction": predictions[prediction], "schedule": schedule, "timesteps": levels}


def _near(betas_N: Tensor, settings: Tree) -> bool:
    """Whether the noise of a scheduler is that of one of our schedules."""
    given, name = settings["trained_betas"], settings["beta_schedule"]
    if given is None and name == "linear":
        given = torch.linspace(settings["beta_start"], settings["beta_end"], len(betas_N)).tolist()
    if given is None and name == "squaredcos_cap_v2":
        given = cosine_betas(len(betas_N)).tolist()
    return given is not None and len(given) == len(betas_N) and bool((betas_N - torch.tensor(given)).abs().max() < NEAR)
