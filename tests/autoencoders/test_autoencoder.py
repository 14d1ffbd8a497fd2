"""diffusers' autoencoders as a first stage."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_moe.autoencoders.autoencoder import Autoencoder, AutoencoderConfig
from dit_moe.autoencoders.base import from_uint8, to_uint8
from tests.autoencoders.small import SMALL, images, make

WEIGHTS = "diffusion_pytorch_model.safetensors"


def stage_of(folder, **options):
    return Autoencoder(AutoencoderConfig(model=folder, **options))


@pytest.mark.parametrize("kind", SMALL)
def test_every_kind_encodes_and_decodes_as_diffusers_does(tmp_path, kind):
    import diffusers

    stage = stage_of(make(tmp_path, kind))
    original = getattr(diffusers, kind).from_pretrained(tmp_path).eval()
    pixels = from_uint8(images())
    with torch.no_grad():
        raw = original.encode(pixels, return_dict=False)[0]
        raw = raw if isinstance(raw, torch.Tensor) else raw.mean
        shift, scale = original.config.get("shift_factor") or 0.0, original.config.scaling_factor
        moments = stage.encode(images())
        assert torch.allclose(moments.mean, (raw - shift) * scale, atol=1e-6)
        assert torch.equal(stage.decode(moments.mean), to_uint8(original.decode(moments.mean / scale + shift).sample))
    assert tuple(moments.mean.shape[1:]) == stage.latent_shape((3, 16, 16))
    assert (moments.std is None) == (kind != "AutoencoderKL")


def test_means_and_stds_per_channel_in_the_autoencoders_config_are_used(tmp_path):
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    stage = stage_of(make(tmp_path, latents_mean=mean, latents_std=std))
    raw, moments = stage.encode_raw(images()), stage.encode(images())
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (mean, std))
    assert torch.allclose(moments.mean, (raw.mean - mean) * 0.5 / std)
    assert torch.allclose(moments.std, raw.std * 0.5 / std)  # scaled, not shifted


def test_a_resolved_config_records_what_tells_the_latent_space(tmp_path):
    config = stage_of(make(tmp_path)).resolved()
    assert (config.kind, config.channels, config.shift, config.scale) == ("AutoencoderKL", 4, (0.25,), (0.5,))
    assert len(config.sha256) == 64
    assert Autoencoder(config).resolved() == config


def test_the_hash_is_of_the_weights_not_of_their_files(tmp_path):
    folder = make(tmp_path)
    before = stage_of(folder).resolved().sha256
    weights = load_file(tmp_path / WEIGHTS)
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt", "note": "written again"})
    assert stage_of(folder).resolved().sha256 == before
    weights["encoder.conv_in.bias"][0] += 1e-3
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    assert stage_of(folder).resolved().sha256 != before


def test_an_autoencoder_with_other_weights_is_refused_with_both_descriptions(tmp_path):
    config = stage_of(make(tmp_path / "one")).resolved()
    assert stage_of(config.model, sha256=config.sha256).resolved() == config
    other = stage_of(make(tmp_path / "two", seed=1)).resolved()
    for stated in (replace(config, model=other.model), AutoencoderConfig(model=other.model, sha256=config.sha256)):
        with pytest.raises(ValueError, match="these latents are of an") as refused:
            Autoencoder(stated).load()
        assert config.sha256[:12] in str(refused.value) and other.sha256[:12] in str(refused.value)


def test_the_latent_shape_and_once_resolved_normalising_need_no_weights(tmp_path):
    stage = stage_of(make(tmp_path))
    config = stage.resolved()
    (tmp_path / WEIGHTS).unlink()
    assert stage_of(config.model).latent_shape((3, 64, 64)) == (4, 16, 16)
    moments = torch.randn(2, 2, 4, 3, 3).half()
    normalized = Autoencoder(config).moments_of({"moments": moments})
    assert torch.equal(normalized.mean, (moments[:, 0].float() - 0.25) * 0.5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 16, 16), "takes images of 3 channels, the data has 1"), ((3, 18, 18), "cannot take images of 3×18×18")],
)
def test_images_that_do_not_fit_are_refused(tmp_path, shape, message):
    with pytest.raises(ValueError, match=message):
        stage_of(make(tmp_path)).latent_shape(shape)


def test_a_missing_or_foreign_model_is_named_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"first_stage.model=.*has no readable config.json.*digits"):
        stage_of(str(tmp_path)).load()
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="is a UNet2DModel; supported are AutoencoderKL"):
        stage_of(str(tmp_path)).load()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 10**5, "has no readable config.json"),
        ("[1]", "has no readable config.json"),
        ("", "has no readable config.json"),
        ('{"_class_name": "AutoencoderKL", "block_out_channels": "wide"}', "has a config.json of no AutoencoderKL"),
        ('{"_class_name": "AutoencoderKL", "norm_num_groups": 7}', "has a config.json of no AutoencoderKL"),
    ],
)
def test_a_config_that_diffusers_cannot_follow_is_one_sentence(tmp_path, text, problem):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"first_stage.model=.*{problem}") as error:
        stage_of(str(tmp_path)).latent_shape((3, 16, 16))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_missing_truncated_or_incomplete_weights_are_refused(tmp_path):
    folder = make(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    whole = weights | {"encoder.conv_in.bias": weights["encoder.conv_in.bias"].to(torch.int32)}
    save_file(whole, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=r"holds I32 for encoder.conv_in.bias, which are no weights; get it anew"):
        stage_of(folder).load()
    del weights["encoder.conv_in.bias"]
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its config.json"):
        stage_of(folder).load()
    index = tmp_path / f"{WEIGHTS}.index.json"
    for found in ('{"weight_map": {"a": "../../etc/passwd"}}', "[" * 10**5, "[]"):
        (tmp_path / WEIGHTS).rename(tmp_path / "aside")
        index.write_text(found)
        with pytest.raises(ValueError, match="no readable safetensors weights") as error:
            stage_of(folder).load()
        assert "\n" not in str(error.value)
        (tmp_path / "aside").rename(tmp_path / WEIGHTS)
        index.unlink()
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(
        ValueError, match=r"first_stage.model=.*safetensors is a pointer of Git LFS .*; run git lfs pull"
    ):
        stage_of(folder).load()
    (tmp_path / WEIGHTS).write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="no readable safetensors weights"):
        stage_of(folder).load()
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"pickled code is never run")
    with pytest.raises(ValueError, match="no readable safetensors weights"):
        stage_of(folder).load()


def test_statistics_need_encoded_latents(tmp_path):
    with pytest.raises(ValueError, match=r"first_stage.normalization=statistics needs latents encoded"):
        stage_of(make(tmp_path), normalization="statistics").load()


def test_slicing_decodes_one_image_at_a_time_and_tiling_is_diffusers_own(tmp_path):
    import diffusers

    folder = make(tmp_path, sample_size=32)
    latents = stage_of(folder).encode(images(2, size=64)).mean
    plain = stage_of(folder).decode(latents)
    sliced = stage_of(folder, slicing=True).decode(latents)
    assert torch.equal(sliced, torch.cat([stage_of(folder).decode(latents[i : i + 1]) for i in range(2)]))
    # Some processors' convolutions round by the number and the layout of images: a pixel may become its neighbour.
    assert (sliced.int() - plain.int()).abs().max() <= 1
    original = diffusers.AutoencoderKL.from_pretrained(tmp_path).eval()
    original.enable_tiling()
    with torch.no_grad():
        tiled = to_uint8(original.decode(latents / 0.5 + 0.25).sample)
    assert (stage_of(folder, tiling=True).decode(latents).int() - tiled.int()).abs().max() <= 1
    assert (tiled.int() - plain.int()).abs().max() > 1


def test_bf16_is_close_to_fp32(tmp_path):
    folder = make(tmp_path)
    exact, rounded = stage_of(folder).encode(images()).mean, stage_of(folder, precision="bf16").encode(images()).mean
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "VQModel"}, "kind=VQModel must be one of"),
        ({"shift": (0.0,)}, "shift=.* belong together"),
        ({"shift": (0.0,), "scale": (1.0, 2.0), "channels": 4}, "needs one number, or one for each"),
        ({"shift": (0.0,), "scale": (0.0,)}, "must not be 0"),
        ({"shift": (), "scale": ()}, r"shift=\(\) needs one number"),
    ],
)
def test_recorded_fields_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(model="digits", **options)
