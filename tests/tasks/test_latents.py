"""What `quickstart` makes for a run on latents, before it trains."""

from dataclasses import replace
from pathlib import Path

import pytest

from dit_moe.autoencoders.kl import CONFIG, MADE_BY, KLConfig
from dit_moe.experiments.autoencoder import AutoencoderSettings
from dit_moe.experiments.image import load_experiment
from dit_moe.tasks import latents


@pytest.fixture
def made(monkeypatch):
    """What was made, in order."""
    calls: list[str] = []
    monkeypatch.setattr(latents, "encode", lambda experiment, split="train", **_: calls.append(split))
    monkeypatch.setattr(latents, "open_images", lambda training: (training, {}))
    monkeypatch.setattr(latents, "train_and_export", lambda *_: calls.append("autoencoder"))
    return calls


def test_held_out_images_are_encoded_too_if_there_is_a_folder_for_them(made):
    for heldout, splits in (("null", ["train"]), ("there", ["train", "heldout"])):
        latents.make_data(load_experiment("digits_latent", [f"data.heldout={heldout}"]))
        assert made == splits
        made.clear()


def test_an_autoencoder_whose_export_was_stopped_is_exported_again(made, tmp_path):
    experiment = load_experiment("digits_latent", [f"first_stage.model={tmp_path}"])
    settings = AutoencoderSettings(autoencoder=KLConfig())
    experiment = replace(experiment, first_stage_training=settings)
    for written, again in ((MADE_BY, True), (CONFIG, False)):
        Path(tmp_path, written).write_text("{}")
        latents.make_data(experiment)
        assert ("autoencoder" in made) is again
        made.clear()
