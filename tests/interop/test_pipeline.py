"""A run as a pipeline of diffusers makes the images of `dit-moe sample`, wherever its folder is opened."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.pipelines.pipeline_utils import PushToHubMixin
from safetensors.torch import save_file

from dit_moe import config
from dit_moe.autoencoders import FIRST_STAGES
from dit_moe.autoencoders.autoencoder import AutoencoderConfig
from dit_moe.diffusion import SAMPLERS
from dit_moe.experiments.run import open_image_run
from dit_moe.interop.pipeline import DiTMoEPipeline, wrap
from dit_moe.randomness import generator
from dit_moe.tasks.model_card import model_card
from tests.analysis.runs import image_run
from tests.cli.conftest import cli

LABELS = torch.tensor([7, 0, 2])
DDPM = ["objective=ddpm", "objective.label_dropout=0.1"]
LATENTS = ["first_stage={name: autoencoder, model: digits}", "model.patch_size=null", "model.name=DiT-custom/1-4E2A"]
CASES = {
    **{name: [f"sample.sampler={{name: {name}, steps: 3}}"] for name in SAMPLERS.names()},
    "guided in an interval": ["sample.guidance={scale: 2.0, interval: [0.3, 0.7]}", "sample.sampler.steps=6"],
    "shifted times": ["objective.time_shift=resolution", "sample.sampler={name: euler, steps: 3}"],
    "towards data": ["objective.direction=to_data", "objective.time_scale=1", "sample.sampler={name: heun, steps: 3}"],
    "another target": ["sample.target=3"],
    "another p by time": ["sample.p=[0.9, 0.4]", "sample.vary=time", "sample.sampler.steps=4"],
    "another k": ["model.moe.router=topk", "sample.target=3"],
    "dense": ["model.name=DiT-custom/2", "model.moe=null"],
    "latents": LATENTS,
}


def run_of(case):
    words = CASES[case]
    trained = SAMPLERS.config_class(case).objective if case in SAMPLERS.names() else "flow"
    return image_run(*(DDPM if trained == "ddpm" else []), *words)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("case", CASES)
def test_a_saved_pipeline_makes_the_images_of_sample_to_the_byte(case, tmp_path):
    run = run_of(case)
    wrap(run).save_pretrained(tmp_path)
    opened = quiet(DiTMoEPipeline.from_pretrained(tmp_path))
    made = run.generator().generate(LABELS).images.permute(0, 2, 3, 1).numpy()
    opened(LABELS, num_inference_steps=5)
    for _ in range(2):  # the scheduler starts anew
        images = opened(LABELS, seed=run.experiment.sample.seed).images
        assert np.array_equal(np.stack(images).reshape(made.shape), made)
    generators = [generator(run.experiment.sample.seed, "image", i) for i in range(len(LABELS))]
    given = opened(LABELS.tolist(), generator=generators, output_type="np").images
    assert np.array_equal((given * 255).round(), made)
    state, own = opened.transformer.network.state_dict(), run.model.state_dict()
    assert state.keys() == own.keys() and all(torch.equal(state[key], own[key]) for key in own)
    assert all(state[key].dtype == own[key].dtype for key in own)


@pytest.mark.parametrize("case", ["ddpm", "towards data", "another p by time", "another k", "latents"])
def test_the_folder_is_opened_as_the_run_that_it_was(case, tmp_path):
    run = replace(run_of(case), class_names=[f"class {label}" for label in range(10)])
    wrap(run).save_pretrained(tmp_path / "pipeline")
    again = open_image_run(tmp_path / "pipeline")
    assert (again.experiment.model, again.experiment.objective) == (run.experiment.model, run.experiment.objective)
    assert again.experiment.sample == run.experiment.sample and again.class_names == run.class_names
    state, own = again.model.state_dict(), run.model.state_dict()
    assert state.keys() == own.keys() and all(torch.equal(state[key], own[key]) for key in own)
    assert all(state[key].dtype == own[key].dtype for key in own)
    assert torch.equal(again.generator().generate(LABELS).images, run.generator().generate(LABELS).images)


@pytest.mark.parametrize("case", ["heun", "latents"])
def test_a_pipeline_of_its_parts_alone_decodes_by_its_own_vae_and_is_opened_as_a_run_too(case, tmp_path):
    run = run_of(case)
    parts = wrap(run)
    pipeline = quiet(DiTMoEPipeline(parts.transformer, parts.scheduler, parts.vae))
    made = run.generator().generate(LABELS).images
    images = np.stack(pipeline(LABELS, seed=run.experiment.sample.seed).images)
    assert np.array_equal(images, made.permute(0, 2, 3, 1).numpy().squeeze(-1))
    pipeline.save_pretrained(tmp_path)
    sampler = run.experiment.sample.sampler
    again = open_image_run(tmp_path, [f"sampler={config.dump(sampler) | {'name': SAMPLERS.name_of(sampler)}}"])
    assert torch.equal(again.generator().generate(LABELS).images, made)


def test_latents_are_decoded_in_the_precision_asked_for_on_the_device_that_the_pipeline_works_on(monkeypatch):
    pipeline = wrap(run_of("latents"))
    monkeypatch.setattr(DiTMoEPipeline, "_execution_device", torch.device("meta"))
    (buffer,) = pipeline.first_stage().buffers(recurse=False)  # by which it chooses where autocast works
    assert buffer.device.type == "meta"


def test_statistics_of_each_place_go_with_the_pipeline(tmp_path):
    run, file = run_of("latents"), tmp_path / "stats.safetensors"
    shape = run.latent_shape
    save_file({"mean": torch.linspace(-1, 1, 16).view(shape), "std": torch.linspace(0.5, 2, 16).view(shape)}, file)
    stage = {"model": "digits", "normalization": "statistics", "statistics": str(file)}
    run = replace(run, stage=FIRST_STAGES.build(AutoencoderConfig(**stage)))
    made = run.generator().generate(LABELS).images.permute(0, 2, 3, 1).numpy()
    wrap(run).save_pretrained(tmp_path / "pipeline")
    file.unlink()
    images = quiet(DiTMoEPipeline.from_pretrained(tmp_path / "pipeline"))(LABELS, seed=0).images
    assert np.array_equal(np.stack(images)[..., None], made)
    again = open_image_run(tmp_path / "pipeline").generator().generate(LABELS).images
    assert np.array_equal(again.permute(0, 2, 3, 1).numpy(), made)


@pytest.mark.parametrize(
    "case, scheduler, steps",
    [
        ("ddim", DDIMScheduler, 20),
        ("ddim", EulerDiscreteScheduler, 20),
        ("dpm++", DPMSolverMultistepScheduler, 20),
        ("heun", FlowMatchEulerDiscreteScheduler, 40),
        ("towards data", FlowMatchEulerDiscreteScheduler, 40),
    ],
)
def test_a_scheduler_of_diffusers_takes_the_place_of_ours_and_leads_to_nearly_the_same(case, scheduler, steps):
    pipeline = quiet(wrap(run_of(case)))
    ours = pipeline(LABELS, seed=0, num_inference_steps=20, output_type="latent").images
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    theirs = pipeline(LABELS, seed=0, num_inference_steps=steps, output_type="latent").images
    assert (theirs - ours).abs().mean() < 0.03 * ours.abs().mean()  # theirs visit other times; worst 0.009


def test_our_scheduler_says_its_times_and_refuses_a_sample_that_is_not_its_own():
    scheduler = wrap(run_of("heun")).scheduler
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [1000, 500, 500, 0] and scheduler.times == [1.0, 0.5, 0.5, 0.0]
    x = torch.randn(2, 1, 8, 8)
    later = scheduler.step(x, 1000, x).prev_sample
    assert torch.equal(later, x + (0.5 - 1) * x)
    with pytest.raises(ValueError, match="sample is not what the last step returned"):
        scheduler.step(x, 500, later + 1)


def test_classes_go_by_name_and_number_and_bad_input_is_told():
    pipeline = quiet(wrap(replace(run_of("euler"), class_names=["cat", "dog", *"23456789"])))
    assert pipeline.class_rows(["dog", "7"]).tolist() == [1, 7] and pipeline.class_rows("dog").tolist() == [1]
    for message, options in {
        r"class.labels=\[bird\] must": {"class_labels": "bird"},
        r"class.labels=\[random\] must": {"class_labels": "random"},  # which `sample` takes for all of them
        "seed and generator exclude": {"seed": 0, "generator": torch.Generator()},
        "generator has 1 entries for 2": {"class_labels": [0, 1], "generator": [torch.Generator()]},
        "guidance.scale=-1.0 must": {"guidance_scale": -1.0},
        "steps=0 must be": {"num_inference_steps": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            pipeline(**{"class_labels": [0], **options})


@pytest.mark.parametrize("how", ["loaded", "cast"])
def test_a_pipeline_in_bf16_keeps_its_routers_in_fp32_and_makes_nearly_the_same(how, tmp_path):
    pipeline = quiet(wrap(run_of("euler")))
    exact = pipeline(LABELS, seed=0, output_type="pt").images
    pipeline.save_pretrained(tmp_path)
    half = DiTMoEPipeline.from_pretrained(tmp_path, **({"dtype": torch.bfloat16} if how == "loaded" else {}))
    half = quiet(half.to(torch.bfloat16) if how == "cast" else half)
    kinds = {name: each.dtype for name, each in half.transformer.named_parameters()}
    assert {kind for name, kind in kinds.items() if "router" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "router" not in name} == {torch.bfloat16}
    assert (half(LABELS, seed=0, output_type="pt").images - exact).abs().mean() < 0.02


def test_an_export_of_images_needs_none_of_the_packages_of_language_models():
    modules = "dit_moe.tasks.pipeline_export, dit_moe.interop.native_pipeline"
    code = f"import sys; sys.modules['transformers'] = None; import {modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    """A folder by the command."""
    folder, words = tmp_path_factory.mktemp("exported") / "pipeline", ["sample.sampler.steps=3", "guidance.scale=2"]
    assert cli("export", finished_run, folder, *words, "--to", "diffusers", "--license", "apache-2.0") == 0
    return folder


def test_our_class_runs_no_code_of_the_folder_and_hands_the_card_on(exported, tmp_path, monkeypatch):
    folder, code = exported, [*exported.rglob("pipeline.py")]
    assert len(code) == 3
    before = [path.read_text() for path in code]
    for path in code:
        path.write_text("raise SystemExit('code was run')")
    pipeline = DiTMoEPipeline.from_pretrained(folder)
    for path, text in zip(code, before, strict=True):
        path.write_text(text)
    pipeline.save_pretrained(tmp_path / "again")
    (tmp_path / "pushed").mkdir()
    (tmp_path / "pushed" / "README.md").write_text("an empty card")
    monkeypatch.setattr(PushToHubMixin, "_upload_folder", lambda *args, **kwargs: None)
    pipeline._upload_folder(tmp_path / "pushed", "someone/model")
    for path in (*folder.rglob("*.*"), folder / "README.md"):
        again = tmp_path / "again" / path.relative_to(folder)
        if path.name != "dit_moe.json" and "config" not in path.name and "index" not in path.name:
            assert again.read_bytes() == path.read_bytes()
    assert (tmp_path / "pushed" / "README.md").read_text() == (folder / "README.md").read_text()


def test_the_card_says_what_is_known_and_how_far_it_compares(exported):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\nlicense: apache-2.0\n")
    assert "not evaluated" in card and "scale: 2.0" in card and "12 evaluations" in card
    facts = json.loads((exported / "dit_moe.json").read_text())
    assert facts["step"] == 4 and facts["experiment"]["sample"]["guidance"]["scale"] == 2


def test_the_card_names_the_settings_that_its_numbers_were_measured_with_where_it_samples_by_others(
    finished_run, tmp_path
):
    a_run = shutil.copytree(finished_run, tmp_path / "run")
    card = partial(model_card, name="name", licence=None)
    assert cli("eval", a_run, "--seeds", "1", "guidance.scale=3", "target=3", "--out", a_run / "metrics.json") == 0
    run = open_image_run(a_run)
    layer = {"active_L": [3.0], "active_std_L": [0.5], "balance_L": [0.9], "load_LE": [[0.25] * 4], "layers_L": [0]}
    facts = {"weights sha256": run.sha256, "split": "heldout", "asked for": "target=3.0"}
    (a_run / "routing").mkdir()
    (a_run / "routing" / "routing.json").write_text(json.dumps({"experts": 4, "facts": facts, **layer}))
    assert "measured with `guidance.scale=3.0`, `target=3.0`, and not as above" in card(run)
    assert "on the split heldout, with target=3.0:" in card(run)
    alike = card(open_image_run(a_run, ["guidance.scale=3", "target=3"]))
    assert "Published numbers" in alike and "not as above" not in alike


@pytest.mark.parametrize(
    "words, message",
    [
        (["{image}", "--license", "mit"], "--license: a run folder has no model card; leave it out, or add"),
        (["{image}", "data.size=16"], "data.size: the run that is made says what was trained on"),
        (["{text}", "--to", "diffusers"], "--to: .* is a language model"),
        (["{text}", "--license", "mit"], "--license: .* is a language model"),
    ],
)
def test_an_option_that_the_export_has_no_use_for_is_refused(words, message, finished_run, finished_text, capsys):
    run, *options = (word.format(image=finished_run, text=finished_text / "run") for word in words)
    capsys.readouterr()
    assert cli("export", run, "exported", *options) == 2
    assert re.search(message, capsys.readouterr().err)
