"""Training an autoencoder from a config file to a folder that diffusers and the first stage load."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from dit_moe import config
from dit_moe.autoencoders.autoencoder import BUNDLED, Autoencoder, AutoencoderConfig
from dit_moe.autoencoders.base import from_uint8
from dit_moe.autoencoders.kl import export
from dit_moe.config import ConfigError
from dit_moe.data.digits import Digits
from dit_moe.tasks.autoencoder import AutoencoderTraining, averaged, describe, exported, prepare
from tests.cli.conftest import cli

CONFIG = str(Path(__file__).parents[2] / "configs" / "autoencoder_digits.yaml")
SMALL = [
    "autoencoder.block_out_channels=[8,8]",
    "autoencoder.norm_num_groups=4",
    "data.size=8",
    "train.steps=4",
    "train.batch_size=8",
    "train.warmup_steps=0",
    "train.checkpoint_every=2",
    "train.log_every=1",
]


def test_training_goes_on_exports_the_averaged_network_and_prints_its_errors(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    words = ["train-autoencoder", CONFIG, "--run", run, "--export", out, *SMALL, "train.sample_every=2"]
    assert cli(*words, "train.steps=2") == 0
    capsys.readouterr()
    assert cli(*words) == 0
    facts = json.loads(capsys.readouterr().out)
    assert json.loads((out / "made_by.json").read_text()) == facts and facts["config"]["train"]["steps"] == 4
    assert cli(*words) == 0  # a finished run is exported again
    assert json.loads(capsys.readouterr().out) == facts
    assert facts["train"]["images"] == 898 and facts["heldout"]["images"] == 450
    assert 0 < facts["heldout"]["mae"] < 255 and facts["heldout"]["psnr"] > 0
    assert facts["latent_shape"] == [4, 4, 4]

    stage = Autoencoder(AutoencoderConfig(model=str(out)))
    resolved = stage.resolved()
    assert (resolved.sha256, resolved.shift, resolved.scale) == (facts["sha256"], (facts["shift"],), (facts["scale"],))
    settings, images = prepare(Path(CONFIG), SMALL)
    some = images["heldout"].__getitems__(range(5))["images"]
    with torch.no_grad():
        mean = averaged(settings, images["train"], run).encode(from_uint8(some)).latent_dist.mean
    assert torch.equal(stage.encode_raw(some).mean, mean)

    assert [path.name for path in sorted((run / "samples").iterdir())] == ["step_00000002.png", "step_00000004.png"]
    in_training, at_the_end = (Image.open(run / name) for name in ("samples/step_00000004.png", "reconstructions.png"))
    assert in_training.size == at_the_end.size and at_the_end.size[0] > 8 * 64
    assert (run / "curves.png").exists()
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_00000002", "step_00000004"]


def test_a_training_starts_from_the_averaged_network_of_another_as_its_error_proposes(tmp_path, capsys):
    words = ["train-autoencoder", CONFIG, *SMALL, "train.steps=1", "--run"]
    assert cli(*words, tmp_path / "run") == 0
    assert cli(*words, tmp_path / "run", "train.batch_size=4") == 2
    (proposed,) = re.findall(r"init_from=\S+", capsys.readouterr().err)
    assert cli(*words, tmp_path / "run-2", "train.batch_size=4", "train.lr=1e-9", f"train.{proposed}") == 0
    settings, images = prepare(Path(CONFIG), SMALL)
    one, other = (averaged(settings, images["train"], tmp_path / run).state_dict() for run in ("run", "run-2"))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_a_run_that_was_begun_before_there_was_an_option_goes_on(tmp_path, monkeypatch):
    words = ["train-autoencoder", CONFIG, *SMALL, "--run", tmp_path]
    with monkeypatch.context() as earlier:
        written = config.to_yaml
        earlier.setattr(config, "to_yaml", lambda settings: written(settings).replace("  lpips_weight: 0.0\n", ""))
        assert cli(*words, "train.steps=1") == 0
    assert "lpips_weight" not in (tmp_path / "config.yaml").read_text()
    assert cli(*words, "train.steps=2") == 0


def test_latents_cannot_be_trained_on(monkeypatch):
    monkeypatch.setattr(Digits, "__getitems__", lambda self, indices: {"moments": None})
    with pytest.raises(ConfigError, match=r"data\.name=digits holds latents; name a data set of images"):
        prepare(Path(CONFIG), SMALL)


def test_an_export_with_the_name_of_the_bundled_one_is_described_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings, images = prepare(Path(CONFIG), SMALL)
    network = settings.autoencoder.build(images["train"].image_shape)
    export(network, images["heldout"], Path("digits"))
    facts = describe(exported(Path("digits")), {"train": images["heldout"]})
    assert facts["parameters"] == sum(parameter.numel() for parameter in network.parameters())


def write_pictures(folder, side):
    random = torch.Generator().manual_seed(side)
    for i in range(4):
        pixels = torch.randint(256, (side, side, 3), dtype=torch.uint8, generator=random)
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / "ab"[i % 2] / f"{i}.png")


def test_held_out_images_of_another_shape_are_refused_before_the_training(tmp_path):
    write_pictures(tmp_path / "images", 16)
    write_pictures(tmp_path / "heldout", 15)
    data = f"data={{name: image_folder, path: {tmp_path / 'images'}, heldout: {tmp_path / 'heldout'}}}"
    with pytest.raises(ConfigError, match=r"data\.heldout images and those .* of 3×15×15 and of 3×16×16"):
        prepare(Path(CONFIG), [*SMALL[:-6], data])


def test_a_folder_of_images_without_held_out_ones_will_do(tmp_path, capsys):
    write_pictures(tmp_path / "images", 16)
    data = f"data={{name: image_folder, path: {tmp_path / 'images'}, size: 16, flip: true}}"
    small = [word for word in SMALL if word != "data.size=8"]
    assert cli("train-autoencoder", CONFIG, "--run", tmp_path / "run", *small, data) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["heldout"] is None and facts["train"]["images"] == 8
    saved = config.load(tmp_path / "run" / "config.yaml")
    assert saved["data"]["fingerprint"]


@pytest.mark.parametrize(
    "change, message",
    [
        ("data.size=12", "data.size=12 must be a multiple of 8"),
        ("data={name: image_folder, path: /nowhere}", "data.path=/nowhere does not exist"),
        ("autoencoder.block_out_channels=[8,8,8,8,8]", "autoencoder.block_out_channels=[8, 8, 8, 8, 8] takes images"),
        (
            "autoencoder.norm_num_groups=3",
            "autoencoder.block_out_channels=(8, 8) must be multiples of norm_num_groups=3",
        ),
        ("loss.lpips_weight=1", "loss.lpips_weight=1.0 needs the network's weights"),
        ("model.depth=2", "model is not a known key"),
    ],
)
def test_mistakes_are_one_line_with_the_dotted_path_and_leave_nothing(tmp_path, capsys, change, message):
    small = [word for word in SMALL if not (change.startswith("data") and word == "data.size=8")]
    assert cli("train-autoencoder", CONFIG, "--run", tmp_path / "run", *small, change) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_the_committed_config_is_the_one_the_bundled_weights_were_made_by():
    made_by = json.loads((BUNDLED["digits"] / "made_by.json").read_text())
    settings = config.build(AutoencoderTraining, config.load(CONFIG))
    assert config.build(AutoencoderTraining, made_by["config"]) == settings
