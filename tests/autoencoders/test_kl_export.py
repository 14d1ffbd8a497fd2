import json

import pytest
import torch

from dit_moe.autoencoders import kl
from dit_moe.autoencoders.autoencoder import BUNDLED, Autoencoder, AutoencoderConfig
from dit_moe.autoencoders.base import Identity, IdentityConfig, from_uint8
from dit_moe.autoencoders.kl import CONFIG, MADE_BY, WEIGHTS, KLConfig, export, latent_statistics, reconstruction_errors
from dit_moe.data import DATASETS
from dit_moe.data.digits import DigitsConfig
from dit_moe.extractors import EXTRACTORS
from dit_moe.extractors.digits_cnn import DigitsCNNConfig
from dit_moe.metrics import FeatureMoments, frechet_distance

TINY = KLConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, attention=False)


@pytest.fixture(scope="module")
def digits():
    return DATASETS.build(DigitsConfig(), "heldout")


@pytest.fixture
def network():
    torch.manual_seed(0)
    return TINY.build((1, 8, 8)).eval()


def pixels_of(digits):
    return from_uint8(digits.__getitems__(range(len(digits)))["images"])


def test_diffusers_loads_the_export_and_computes_the_same(tmp_path, network, digits):
    from diffusers import AutoencoderKL

    export(network, digits, tmp_path / "new" / "folder")
    loaded = AutoencoderKL.from_pretrained(tmp_path / "new" / "folder").eval()
    with torch.no_grad():
        assert torch.equal(loaded(pixels_of(digits)).sample, network(pixels_of(digits)).sample)
    assert loaded.config.latent_channels == 4 and loaded.config.scaling_factor == network.config.scaling_factor


def test_shift_and_scale_are_those_that_give_draws_of_the_posteriors_mean_0_and_std_1(tmp_path, network, digits):
    with torch.no_grad():
        posterior = network.encode(pixels_of(digits)).latent_dist
    mean, std = latent_statistics(network, digits)
    variance = posterior.mean.double().var(correction=0) + posterior.var.double().mean()
    assert mean == pytest.approx(posterior.mean.double().mean().item(), rel=1e-4)
    assert std == pytest.approx(variance.sqrt().item(), rel=1e-5)
    export(network, digits, tmp_path)
    resolved = Autoencoder(AutoencoderConfig(model=str(tmp_path))).resolved()
    assert resolved.shift == pytest.approx((mean,)) and resolved.scale == pytest.approx((1 / std,))


def test_a_crash_in_the_middle_leaves_nothing_that_loads(tmp_path, network, digits, monkeypatch):
    export(network, digits, tmp_path)
    before = (tmp_path / CONFIG).read_text()

    def fail(path, content):
        if path.name == WEIGHTS:
            raise OSError("the disk is full")

    monkeypatch.setattr(kl, "write_atomically", fail)
    with pytest.raises(OSError, match="full"):
        export(network, digits, tmp_path)
    assert not (tmp_path / CONFIG).exists()
    monkeypatch.undo()
    export(network, digits, tmp_path)
    assert (tmp_path / CONFIG).read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS, MADE_BY]


def test_neither_an_autoencoder_from_elsewhere_nor_a_file_is_replaced(tmp_path, network, digits):
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(ValueError, match=r"config.json is there already, and nothing says that dit-moe wrote it"):
        export(network, digits, tmp_path)
    assert (tmp_path / CONFIG).read_text() == "{}" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="cannot be written"):
        export(network, digits, tmp_path / CONFIG / "folder")


class OneGreyLevelOff(Identity):
    def decode(self, latents_BCHW):
        return super().decode(latents_BCHW) ^ 1


def test_errors_are_in_grey_levels_and_decibels(digits):
    errors = reconstruction_errors(OneGreyLevelOff(IdentityConfig()), digits)
    assert errors == {"images": 450, "mae": 1.0, "psnr": pytest.approx(48.1308, abs=1e-4)}  # 20·log10(255)
    assert reconstruction_errors(Identity(IdentityConfig()), digits) == {"images": 450, "mae": 0.0, "psnr": None}


def test_of_many_images_some_spread_over_all_are_measured(digits, monkeypatch):
    monkeypatch.setattr(kl, "MOST_IMAGES", 100)
    asked = []

    class Recorded:
        def __len__(self):
            return len(digits)

        def __getitems__(self, indices):
            asked.extend(indices)
            return digits.__getitems__(indices)

    assert reconstruction_errors(Identity(IdentityConfig()), Recorded())["images"] == 100
    assert len(set(asked)) == 100 and (asked[0], asked[-1]) == (0, 449)


# ------------------------------------------------------------------------------------------- the one that comes along


@pytest.fixture(scope="module")
def bundled():
    return Autoencoder(AutoencoderConfig(model="digits"))


def test_the_bundled_weights_are_small_and_say_how_they_were_made(bundled):
    folder = BUNDLED["digits"]
    assert (folder / WEIGHTS).stat().st_size <= 1_000_000
    made_by = json.loads((folder / "made_by.json").read_text())
    resolved = bundled.resolved()
    assert made_by["sha256"] == resolved.sha256
    assert (made_by["shift"],) == resolved.shift and (made_by["scale"],) == resolved.scale


def test_the_bundled_autoencoder_reconstructs_held_out_digits(bundled):
    heldout = DATASETS.build(DigitsConfig(size=32), "heldout")
    assert bundled.latent_shape(heldout.image_shape) == (4, 8, 8)
    errors = reconstruction_errors(bundled, heldout)
    assert errors["psnr"] > 38 and errors["mae"] < 1.5  # 38.5 and 1.40 when committed


def test_its_reconstructions_are_at_the_floor_and_near_it_with_noise_on_the_latents(bundled):
    extractor = EXTRACTORS.build(DigitsCNNConfig())
    train, heldout = (DATASETS.build(DigitsConfig(size=32), name) for name in ("train", "heldout"))
    train, heldout = (each.__getitems__(range(len(each))) for each in (train, heldout))
    reference = FeatureMoments.of(extractor(train["images"]).features_BD)

    def distance(features_BD):
        found = FeatureMoments.of(features_BD)
        return frechet_distance(found.mean_D, found.covariance(), reference.mean_D, reference.covariance())

    floor = distance(extractor(heldout["images"]).features_BD)
    mean = bundled.encode(heldout["images"]).mean
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    for sigma, most in ((0.0, 1.05), (0.2, 1.15)):  # 1.02 and 1.09 when committed
        decoded = extractor(bundled.decode(mean + sigma * noise)).features_BD
        assert distance(decoded) / floor < most
        assert (extractor.logits(decoded).argmax(1) == heldout["labels"]).double().mean() > 0.99
