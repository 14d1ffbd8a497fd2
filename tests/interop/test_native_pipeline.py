"""A dense run as diffusers' own DiTPipeline."""

import diffusers
import numpy as np
import pytest
import torch

from dit_moe.experiments.run import open_image_run
from dit_moe.formats import recognise
from dit_moe.interop.pipeline import wrap
from tests.autoencoders.small import make
from tests.cli.conftest import cli
from tests.formats.test_diffusers import random_transformer

WORDS = ["white shark", "golden retriever"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A pipeline's folder with a small transformer of 1000 classes."""
    folder = tmp_path_factory.mktemp("native") / "source"
    random_transformer(num_embeds_ada_norm=1000).save_pretrained(folder / "transformer")
    make(folder / "vae", shift_factor=None)
    (folder / "model_index.json").write_text("{}")
    return folder


def test_diffusers_opens_it_without_our_code_and_makes_what_our_pipeline_makes(source, tmp_path):
    assert cli("export", source, tmp_path / "out", "--to", "diffusers-dit", "--license", "cc-by-nc-4.0") == 0
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    ours = wrap(open_image_run(source, ["guidance.channels=null"]))  # theirs guides all channels
    ours.scheduler = diffusers.DDIMScheduler.from_config(ours.scheduler.config)
    assert "The weights were trained elsewhere" in (tmp_path / "out" / "README.md").read_text()
    assert type(theirs) is diffusers.DiTPipeline and theirs.get_label_ids(WORDS) == ours.class_rows(WORDS).tolist()
    options = {"num_inference_steps": 4, "guidance_scale": 1.5, "output_type": "np"}
    made = [
        pipe(rows, generator=[torch.Generator().manual_seed(i) for i in range(2)], **options).images
        for pipe, rows in ((theirs, theirs.get_label_ids(WORDS)), (ours, WORDS))
    ]
    assert np.abs(made[0] - made[1]).max() <= 1 / 255  # theirs are not rounded to grey levels


def test_it_is_read_back_as_it_was(source, tmp_path):
    assert cli("export", source, tmp_path / "out", "--to", "diffusers-dit") == 0
    before, after = recognise(source), recognise(tmp_path / "out")
    assert after.config()["model"] == before.config()["model"]
    theirs, back = before.weights("ema"), after.weights("ema")
    assert theirs.keys() == back.keys() and all(torch.equal(theirs[name], back[name]) for name in theirs)


def test_what_it_computes_otherwise_is_refused_by_name(finished_run, source, tmp_path, capsys):
    assert cli("export", finished_run, tmp_path / "out", "--to", "diffusers-dit") == 2
    assert "does not fit that format" in capsys.readouterr().err
    words = ["first_stage.shift=[0.25]", "first_stage.scale=[0.5]"]
    assert cli("export", source, tmp_path / "out", *words, "--to", "diffusers-dit") == 2
    assert "first_stage.shift=(0.25,): DiTPipeline scales all latents alike" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
