"""Which latent space an experiment lives in."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit_moe.autoencoders.autoencoder import Autoencoder, AutoencoderConfig
from dit_moe.autoencoders.base import IdentityConfig
from dit_moe.autoencoders.encoder import EncodeConfig
from dit_moe.autoencoders.latent_space import require_encoded_so, require_same_latents, resolve_first_stage
from dit_moe.config import ConfigError, flatten
from dit_moe.data import DATASETS
from dit_moe.data.latents import LatentsConfig
from tests.autoencoders.encoded import DIGITS, autoencoder, encode
from tests.autoencoders.small import make


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resolve")
    manifest = encode(folder / "latents", stage=autoencoder(folder / "autoencoder"))
    return DATASETS.build(LatentsConfig(path=str(folder / "latents")), "train"), manifest, str(folder / "autoencoder")


def test_latents_say_themselves_what_they_were_made_by(made):
    dataset, manifest, model = made
    config, shape = resolve_first_stage(None, dataset)
    assert (config.model, config.sha256) == (model, manifest.autoencoder["sha256"])
    assert shape == (4, 4, 4)


def test_training_on_latents_needs_no_autoencoder_to_be_there(made):
    dataset, _, _ = made
    with pytest.warns(UserWarning, match="was/deleted is not there to be compared"):
        config, _ = resolve_first_stage(AutoencoderConfig(model="was/deleted"), dataset)
    rows = dataset.__getitems__([0, 1])
    assert torch.equal(Autoencoder(config).moments_of(rows).mean, (rows["moments"][:, 0].float() - 0.25) * 0.5)


def test_the_latents_own_statistics_make_them_of_unit_size(made):
    dataset, manifest, model = made
    config, _ = resolve_first_stage(AutoencoderConfig(model=model, normalization="statistics"), dataset)
    assert config.shift == manifest.mean
    mean, std = Autoencoder(config).moments_of(dataset.__getitems__(range(len(dataset))))
    draws = mean + std * torch.randn(200, *mean.shape, generator=torch.Generator().manual_seed(0))
    assert draws.mean((0, 1, 3, 4)) == pytest.approx([0] * 4, abs=5e-3)
    assert draws.std((0, 1, 3, 4)) == pytest.approx([1] * 4, abs=5e-3)


def test_a_channel_without_spread_is_named_where_statistics_would_divide_by_it(made, monkeypatch):
    dataset, manifest, model = made
    for mean, std in ((0.0, 0.0), (-3.5, 7e-8)):
        flat = {"mean": (*manifest.mean[:2], mean, 0.1), "std": (*manifest.std[:2], std, 1.0)}
        monkeypatch.setattr(dataset, "manifest", replace(manifest, **flat))
        wanted = rf"^first_stage.normalization=statistics: channel 2 of the latents is {mean:.5g} everywhere.*; encode"
        with pytest.raises(ConfigError, match=wanted):
            resolve_first_stage(AutoencoderConfig(model=model, normalization="statistics"), dataset)
        resolve_first_stage(AutoencoderConfig(model=model), dataset)


@pytest.mark.parametrize(
    "wrong",
    [{"latents_mean": [0.0] * 4, "latents_std": [1.0, 0.0, 1.0, 1.0]}, {"scaling_factor": "much"}],
    ids=["without spread", "no number"],
)
def test_an_autoencoder_whose_own_normalization_cannot_be_right_is_refused(made, tmp_path, wrong):
    folder = Path(shutil.copytree(made[2], tmp_path / "wrong"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(ConfigError, match=r"^first_stage.model=.* has a config.json that cannot be right: scaling"):
        resolve_first_stage(AutoencoderConfig(model=str(folder)), DATASETS.build(DIGITS, "train"))


def test_on_the_fly_the_autoencoder_is_asked_itself_and_without_one_latents_are_pixels(made):
    _, manifest, model = made
    config, shape = resolve_first_stage(AutoencoderConfig(model=model), DATASETS.build(DIGITS, "train"))
    assert (config.sha256, config.scale, shape) == (manifest.autoencoder["sha256"], (0.5,), (4, 4, 4))
    assert resolve_first_stage(None, DATASETS.build(DIGITS, "train")) == (IdentityConfig(), (1, 16, 16))


def test_a_stated_shift_and_scale_are_used_as_those_of_a_run_to_start_from_are(made):
    dataset, _, model = made
    options = {"normalization": "statistics", "shift": (0.0,), "scale": (0.18215,)}
    config, _ = resolve_first_stage(AutoencoderConfig(model=model, **options), dataset)
    assert (config.shift, config.scale) == ((0.0,), (0.18215,))


def test_another_autoencoder_under_another_name_is_noticed_before_training(made, tmp_path):
    dataset, manifest, _ = made
    other = AutoencoderConfig(model=make(tmp_path, in_channels=1, out_channels=1, seed=1))
    with pytest.raises(ValueError, match="these latents are of an AutoencoderKL") as refused:
        resolve_first_stage(other, dataset)
    assert manifest.autoencoder["sha256"][:12] in str(refused.value)


@pytest.mark.parametrize("options", [{"sha256": "f" * 64}, {"channels": 16}])
def test_latents_of_another_space_than_the_config_states_are_refused_with_both_descriptions(made, options):
    dataset, manifest, model = made
    given = AutoencoderConfig(model=model, **options)
    with pytest.raises(ValueError, match="first_stage is of the latent space") as refused:
        resolve_first_stage(given, dataset)
    assert manifest.autoencoder["sha256"][:12] in str(refused.value)
    assert "4 channels" in str(refused.value)


def test_pixels_and_latents_are_not_mixed(made):
    dataset, _, model = made
    with pytest.raises(
        ValueError, match=r"first_stage.name=identity cannot read latents of AutoencoderKL with weights"
    ):
        resolve_first_stage(IdentityConfig(), dataset)
    config, _ = resolve_first_stage(AutoencoderConfig(model=model), dataset)
    with pytest.raises(
        ValueError, match=r"first_stage is of the latent space pixels in .*, but the run in runs/a is of"
    ):
        require_same_latents(config, IdentityConfig(), "first_stage", "the run in runs/a")
    moved = replace(config, model="elsewhere", tiling=True)
    require_same_latents(config, moved, "first_stage", "the run in runs/a")


@pytest.mark.parametrize("option", [{"flips": False}, {"images": {"size": 32}}])
def test_latents_are_not_trained_on_by_a_config_that_encodes_others(made, option):
    dataset, *_ = made
    images = DATASETS.config_class("digits")(**option.get("images", {"size": 16}))
    require_encoded_so(EncodeConfig(images=DIGITS, batch_size=3, shard_size=7, workers=1), dataset)
    (key, value), *_ = flatten(option).items()
    with pytest.raises(
        ConfigError, match=rf"^encode\.{key}={value} differs from the latents in .*; take that value, or"
    ):
        require_encoded_so(EncodeConfig(**option | {"images": images}), dataset)


def test_where_encoded_images_lie_may_change_but_not_the_share_that_is_held_out(made, monkeypatch):
    dataset, manifest, _ = made
    folder = DATASETS.config_class("image_folder")
    recorded = {"name": "image_folder", "path": "there", "heldout": 0.1, "reserve": None, "size": 16}
    monkeypatch.setattr(dataset, "manifest", replace(manifest, encoding=manifest.encoding | {"images": recorded}))
    for shares in ({"heldout": 0.1}, {"heldout": 0.2}, {"heldout": "val"}, {"heldout": 0.1, "reserve": 0.1}):
        config = EncodeConfig(images=folder(path="here", size=16, min_side=9, orientation=None, **shares))
        if shares == {"heldout": 0.1}:
            require_encoded_so(config, dataset)
        else:
            with pytest.raises(ConfigError, match=r"^encode\.images\.(heldout|reserve)=.* differs from the latents in"):
                require_encoded_so(config, dataset)
