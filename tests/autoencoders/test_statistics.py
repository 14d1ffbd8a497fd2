"""Statistics of latents that a file holds, per channel or for each place of them."""

import pytest
import torch
from safetensors.torch import save_file

from dit_moe.autoencoders.autoencoder import Autoencoder, AutoencoderConfig
from dit_moe.autoencoders.latent_space import require_same_latents, resolve_first_stage
from dit_moe.autoencoders.own_copy import OWN_STATISTICS, copy_statistics, with_own_copy
from dit_moe.config import ConfigError
from dit_moe.data import DATASETS
from dit_moe.data.latents import LatentsConfig
from tests.autoencoders.encoded import DIGITS, autoencoder, encode

MEAN, STD = torch.linspace(-1, 1, 64).view(4, 4, 4), torch.linspace(0.5, 2, 64).view(4, 4, 4)
CHANNELS = {"mean": MEAN[:, 0, 0].view(1, 4, 1, 1), "std": STD[:, 0, 0].view(1, 4, 1, 1)}  # as LightningDiT keeps them
PLACES = {"mean": MEAN, "std": STD}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics")
    encode(folder / "latents", stage=autoencoder(folder / "autoencoder"))
    return DATASETS.build(LatentsConfig(path=str(folder / "latents")), "train"), str(folder / "autoencoder")


def given(model, path, **options) -> AutoencoderConfig:
    return AutoencoderConfig(model=model, normalization="statistics", statistics=str(path), **options)


@pytest.mark.parametrize("tensors", [CHANNELS, PLACES], ids=["channels", "places"])
@pytest.mark.parametrize("data", ["latents", "images"])
def test_latents_are_normalised_by_the_file_s_statistics_and_decoded_back(made, tmp_path, tensors, data):
    dataset, model = made
    torch.save(tensors, tmp_path / "stats.pt")
    source = dataset if data == "latents" else DATASETS.build(DIGITS, "train")
    config, _ = resolve_first_stage(given(model, tmp_path / "stats.pt"), source)
    rows, stage, plain = source.__getitems__([0, 1]), Autoencoder(config), Autoencoder(AutoencoderConfig(model=model))
    raw = rows["moments"].float().unbind(1) if data == "latents" else plain.encode_raw(rows["images"])
    found = stage.moments_of(rows)
    torch.testing.assert_close(found.mean, (raw[0] - tensors["mean"]) / tensors["std"])
    torch.testing.assert_close(found.std, raw[1] / tensors["std"])
    as_the_model_wants = (raw[0] - 0.25) * 0.5
    assert (stage.decode(found.mean).int() - plain.decode(as_the_model_wants).int()).abs().max() <= 1  # a rounding


def test_statistics_of_channels_become_shift_and_scale_and_the_file_is_needed_no_more(made, tmp_path):
    dataset, model = made
    save_file({name: each.contiguous() for name, each in CHANNELS.items()}, tmp_path / "stats.safetensors")
    config, _ = resolve_first_stage(given(model, tmp_path / "stats.safetensors"), dataset)
    assert (config.statistics, config.shift) == (None, tuple(MEAN[:, 0, 0].tolist()))
    assert config.scale == pytest.approx(tuple((1 / STD[:, 0, 0]).tolist()))


def test_a_run_keeps_the_statistics_of_places_and_their_hash_tells_the_latent_space(made, tmp_path):
    dataset, model = made
    torch.save(PLACES, tmp_path / "stats.pt")
    config, _ = resolve_first_stage(given(model, tmp_path / "stats.pt"), dataset)
    copy_statistics(config, tmp_path)
    (tmp_path / "stats.pt").unlink()
    own = with_own_copy(config, tmp_path)
    rows = dataset.__getitems__([0])
    torch.testing.assert_close(Autoencoder(own).moments_of(rows).mean, (rows["moments"][:, 0].float() - MEAN) / STD)
    require_same_latents(config, own, "first_stage", "the run in runs/a")
    torch.save(PLACES | {"std": STD + 1}, tmp_path / "stats.pt")
    other, _ = resolve_first_stage(given(model, tmp_path / "stats.pt"), dataset)
    with pytest.raises(ConfigError, match=r"first_stage is of the latent space .* statistics of each place"):
        require_same_latents(config, other, "first_stage", "the run in runs/a")
    with pytest.raises(ConfigError, match=r"first_stage.statistics=.* holds others than those recorded"):
        Autoencoder(config).moments_of(rows)
    assert OWN_STATISTICS in {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "tensors, problem",
    [
        ({"mean": MEAN}, "holds no std; name a file with mean and std of the latents"),
        ({"mean": MEAN, "std": STD[:, :2]}, r"shapes \[4, 4, 4\] and \[4, 2, 4\]; both must be \[C\] or"),
        ({"mean": MEAN, "std": 0 * STD}, "or a std that is not above 0"),
        ({"mean": MEAN[:, :2, :2], "std": STD[:, :2, :2]}, r"is of latents \[4, 2, 2\], and these are 4×4×4"),
        ({"mean": MEAN[:3, 0, 0], "std": STD[:3, 0, 0]}, r"is of latents \[3, 1, 1\]"),
    ],
)
def test_a_file_of_other_things_is_refused(made, tmp_path, tensors, problem):
    dataset, model = made
    torch.save(tensors, tmp_path / "stats.pt")
    with pytest.raises(ConfigError, match=rf"^first_stage.statistics=.*stats.pt .*{problem}"):
        resolve_first_stage(given(model, tmp_path / "stats.pt"), dataset)


def test_a_file_is_of_use_only_to_normalization_by_statistics_without_shift_and_scale():
    with pytest.raises(ConfigError, match=r"^statistics=a.pt needs normalization=statistics, not model"):
        AutoencoderConfig(model="digits", statistics="a.pt")
    with pytest.raises(ConfigError, match=r"^statistics=a.pt and scale=\(1.0,\) contradict each other"):
        given("digits", "a.pt", shift=(0.0,), scale=(1.0,))
