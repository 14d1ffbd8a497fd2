"""The README.md of a model that is handed on: what it is, how it samples, what was measured, under which licence."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

from dit_moe import config, yaml_text
from dit_moe.config import Tree
from dit_moe.diffusion import OBJECTIVES, SAMPLERS
from dit_moe.evaluation.report import Report
from dit_moe.experiments.run import ImageRun
from dit_moe.formatting import first_few, markdown_table
from dit_moe.json_files import read_object

METRICS, ROUTING = "metrics.json", Path("routing", "routing.json")  # of a run folder
SHOWN = 10  # classes, or settings
SETTINGS = ("sampler", "guidance", "target", "p")  # of the section `sample`: what numbers of the same weights depend on
OWN_USE = """```python
from dit_moe.interop.pipeline import DiTMoEPipeline

pipe = DiTMoEPipeline.from_pretrained("{name}")
images = pipe([0, 1], seed=0).images
```

A program that imports diffusers alone, where `dit_moe` is installed, opens it by
`DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)`."""
NATIVE_USE = """```python
from diffusers import DiTPipeline

pipe = DiTPipeline.from_pretrained("{name}")
images = pipe([0, 1], guidance_scale=1.5).images
```

Its scheduler visits other times than the sampler below."""


def model_card(run: ImageRun, name: str, licence: str | None, native: bool = False) -> str:
    """Markdown, with the head that the Hugging Face hub reads.

    Args:
        name: of the model.
        licence: of the weights, as the hub calls it; None: the card says that there is none yet.
        native: whether it is a pipeline of diffusers' own.
    """
    tags = [
        "dit_moe",
        "class-conditional-image-generation",
        *(["mixture-of-experts"] if run.experiment.model.moe else []),
    ]
    head = ModelCardData(library_name="diffusers", license=licence, tags=tags).to_yaml()
    sections = {
        "": _what(run),
        "Use": (NATIVE_USE if native else OWN_USE).format(name=name),
        "Sampling": _sampling(run),
        "Evaluation": _evaluation(run),
        "Routing": _routing(run),
        "Training": _training(run),
        "Licence": licence or "None was named yet, so that nobody else may use the weights.",
    }
    written = [f"## {title}\n\n{text}" if title else text for title, text in sections.items() if text]
    return f"---\n{head}\n---\n\n# {name}\n\n" + "\n\n".join(written) + "\n"


def _what(run: ImageRun) -> str:
    model = run.experiment.model
    size, latents = model.footprint(), f"{model.in_channels}×{model.input_size}×{model.input_size}"
    active = f", of which a token uses {size.active_params / 1e6:.4g} million on average" if model.moe else ""
    names = f": {first_few(run.class_names, SHOWN)}" if run.class_names else ""
    objective = OBJECTIVES.name_of(run.experiment.objective)
    return (
        f"A {model.name} that was trained with the objective `{objective}` on latents of {latents}. "
        f"It has {size.total_params / 1e6:.4g} million parameters{active}. "
        f"It makes images of {model.num_classes} classes{names}."
    )


def _sampling(run: ImageRun) -> str:
    sample, latents = run.experiment.sample, run.latent_shape
    evaluations = SAMPLERS.build(sample.sampler, run.objective).evaluations(sample.guidance, latents)
    tree = config.dump(sample)
    kept = {key: tree[key] for key in (*SETTINGS, "weights") if tree[key] is not None}
    return f"{evaluations} evaluations of the network for an image, by default:\n\n{_yaml(kept)}"


def _evaluation(run: ImageRun) -> str:
    tree = read_object(run.home / METRICS)
    if not tree or run.sha256 not in str(tree.get("provenance")):
        return "These weights were not evaluated before they were written."
    report = Report.from_json(tree)
    others = _other_settings(run, report)
    told = f"They were measured with {first_few(others, SHOWN)}, and not as above.\n\n" if others else ""
    reasons = [f"* {reason.text}" for reason in report.provenance.reasons]
    stand = "may" if report.provenance.comparable else "may not"
    because = ":\n\n" + "\n".join(reasons) if reasons else "."
    return f"{told}```\n{str(report).strip()}\n```\n\nPublished numbers {stand} stand beside these{because}"


def _other_settings(run: ImageRun, report: Report) -> list[str]:
    """How the evaluated images were sampled, where that is not how the model that is written samples."""
    now, found = _settings(config.dump(run.experiment.sample)), dict[str, None]()
    for made in report.provenance.samples:
        facts = {**made, **made.get("sample", {})}  # those of a file are in the description beside it
        then = _settings(facts.get("experiment", {}).get("sample", {}))
        found |= {f"`{key}={value}`": None for key, value in then.items() if now.get(key) != value}
    return list(found)


def _settings(sample: Tree) -> Tree:
    """`SETTINGS` of a section `sample`, by dotted keys."""
    return config.flatten({key: sample[key] for key in SETTINGS if key in sample})


def _routing(run: ImageRun) -> str:
    found = read_object(run.home / ROUTING)
    if not found or run.sha256 not in str(found.get("facts")):
        return ""
    experts, columns = found["experts"], ("active_L", "active_std_L", "balance_L")
    active, spread, balance = ([f"{value:.3g}" for value in found[column]] for column in columns)
    busiest = [f"{max(load_E) * experts:.3g}" for load_E in found["load_LE"]]
    table = {"block": list(map(str, found["layers_L"])), "active experts": active, "± over tokens": spread}
    table |= {"balance (1 is even)": balance, "busiest expert, times an even share": busiest}
    asked = f", with {asked}" if (asked := found["facts"].get("asked for")) else ""
    place = f"on the split {found['facts']['split']}{asked}"
    return f"Of {experts} experts a layer, {place}:\n\n{markdown_table(table.items())}"


def _training(run: ImageRun) -> str:
    experiment, train = run.experiment, run.experiment.train
    tree = config.dump(experiment)
    told = "The weights were trained elsewhere: they were imported, or made from those of another run."
    if run.step:
        steps = f"{run.step:,} optimizer steps of {train.batch_size} images"
        told = f"{steps}, at a learning rate of {train.lr:g}, seed {experiment.seed}."
    return f"{told}\n\n{_yaml({key: tree[key] for key in ('model', 'objective')})}"


def _yaml(tree: Tree) -> str:
    return f"```yaml\n{yaml_text.write(tree).strip()}\n```"
