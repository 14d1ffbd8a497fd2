"""DINOv2 with random weights: what goes into it, and that it is DINOv2 and not a relative."""

from urllib.error import HTTPError

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from dit_moe import downloads
from dit_moe.extractors import EXTRACTORS, dinov2
from dit_moe.extractors.dinov2 import DINOv2Config, preprocess, resample
from tests.extractors.random_networks import noise

SMALL = "vit_small_patch14_dinov2"


def build(weights, model=SMALL):
    return EXTRACTORS.build(DINOv2Config(model=model, weights=str(weights)))


@pytest.fixture(scope="module")
def extractor(dinov2_weights):
    return build(dinov2_weights)


def test_the_feature_is_the_normed_class_token(extractor):
    images = noise(2, 224)
    assert extractor.name == f"dinov2_vits14_{extractor.sha256[:8]}" and extractor.dim == 384
    with torch.no_grad():
        tokens = extractor.network.forward_features(preprocess(images))
    found = extractor(images).features_BD
    torch.testing.assert_close(found, tokens[:, 0], rtol=1e-5, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.1  # the blocks do something
    assert tokens.shape[1] == 1 + 16 * 16


def cubic(x, a=-0.75):
    """Keys' kernel with the constant that torch has."""
    x = abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((x - 5) * x + 8) * x * a - 4 * a
    return near if x <= 1 else far if x < 2 else 0.0


def test_position_embeddings_are_resampled_as_dinov2_does_it(extractor, dinov2_weights):
    embedding = torch.randn(1, 1 + 37 * 37, 5, generator=torch.Generator().manual_seed(0))
    weights = np.zeros((16, 37))
    for i in range(16):
        centre = (i + 0.5) * 37 / 16.1 - 0.5  # a side overstated by 0.1
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            weights[i, min(max(j, 0), 36)] += cubic(centre - j)
    grid = embedding[0, 1:].double().reshape(37, 37, 5)
    expected = torch.einsum("ia,jb,abd->ijd", *[torch.from_numpy(weights)] * 2, grid).reshape(256, 5)
    found = resample(embedding)
    assert torch.equal(found[:, :1], embedding[:, :1])  # the class token's
    torch.testing.assert_close(found[0, 1:].double(), expected, rtol=0, atol=3e-5)  # 1.0e-5; it works in fp32
    embedding = torch.load(dinov2_weights, weights_only=True)["pos_embed"]
    assert torch.equal(extractor.network.pos_embed, resample(embedding))  # and not as timm does it:
    timms = timm.layers.resample_abs_pos_embed(embedding, (16, 16))
    assert (extractor.network.pos_embed - timms).abs().max() > 0.1


def test_images_are_resized_smoothly_and_normalised_by_imagenets_statistics():
    images = noise(2, 224)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (dinov2.MEAN, dinov2.STD))
    torch.testing.assert_close(preprocess(images), (images / 255 - mean) / std, rtol=0, atol=1e-5)
    flat = torch.full((1, 3, 50, 70), 200, dtype=torch.uint8)
    torch.testing.assert_close(preprocess(flat), ((200 / 255 - mean) / std).expand(1, 3, 224, 224), rtol=0, atol=1e-5)
    stripes = torch.zeros(1, 3, 448, 448, dtype=torch.uint8)
    stripes[..., ::2] = 200
    inside = (preprocess(stripes) * std + mean)[..., 8:-8] * 255
    assert (inside - 100).abs().max() < 10  # without antialiasing it would be 0 or 200


def test_the_hash_is_of_the_weights_whatever_their_file(extractor, dinov2_weights, tmp_path):
    weights = torch.load(dinov2_weights, weights_only=True)
    weights.pop("mask_token")  # timm's files have none
    safetensors.torch.save_file(weights, tmp_path / "timms.safetensors")
    assert build(tmp_path / "timms.safetensors").sha256 == extractor.sha256
    weights["norm.bias"] += 1
    safetensors.torch.save_file(weights, tmp_path / "others.safetensors")
    assert build(tmp_path / "others.safetensors").sha256 != extractor.sha256


def test_weights_of_another_size_are_refused(tmp_path, dinov2_weights):
    weights = torch.load(dinov2_weights, weights_only=True)
    weights["blocks.3.mlp.fc1.bias"] = torch.zeros(7)
    path = tmp_path / "other.pth"
    torch.save(weights, path)
    with pytest.raises(ValueError, match=f"{path} does not hold the weights of {SMALL} .*fc1.bias.*--weights"):
        build(path)


def test_without_network_the_error_says_what_to_get_at_once_and_an_answer_of_any_kind_is_one(monkeypatch, tmp_path):
    def offline(*args, **options):
        asked.append(options)
        raise OSError("no network")

    def refuse(request, timeout):
        raise HTTPError(request.full_url, 403, "forbidden", None, None)

    asked: list[dict[str, float]] = []
    monkeypatch.setattr(downloads.urllib.request, "urlopen", offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = r"dinov2_vitl14_pretrain.pth, .* \(no network\); get it elsewhere from https://.*pth, .*--weights FILE"
    with pytest.raises(ValueError, match=message):
        EXTRACTORS.build(DINOv2Config())
    assert asked == [{"timeout": downloads.PATIENCE}] and downloads.PATIENCE <= 5  # once, and not for long
    monkeypatch.setattr(downloads.urllib.request, "urlopen", refuse)
    downloads.require_reachable("https://example.org")


def test_the_copy_in_the_hubs_cache_is_taken_without_asking_anyone(monkeypatch, dinov2_weights):
    def at_hand(repo_id, filename, local_files_only):
        assert (repo_id, filename, local_files_only) == (f"timm/{SMALL}.lvd142m", "model.safetensors", True)
        return str(dinov2_weights)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", at_hand)
    monkeypatch.setattr(dinov2, "require_reachable", None)
    assert EXTRACTORS.build(DINOv2Config(model=SMALL)).name == build(dinov2_weights).name
