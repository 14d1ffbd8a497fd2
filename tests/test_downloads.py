"""What is not downloaded: of a dry run anything, and from a Hub that does not answer nothing."""

import re
import socket
import time

import pytest
import torch
from huggingface_hub import constants

from dit_moe import downloads
from dit_moe.autoencoders.autoencoder import Autoencoder, AutoencoderConfig
from dit_moe.data import DATASETS
from dit_moe.text.tokenizer import TokenizerConfig, open_tokenizer
from tests.cli.conftest import CONFIG, cli

SIZES = ["model.in_channels=1", "model.input_size=8", "model.num_classes=10"]
HUB = "from the Hugging Face Hub"


@pytest.fixture
def empty_machine(tmp_path, monkeypatch):
    """A folder without data, caches without weights, and a network that is not to be asked."""

    def refuse(*args):
        raise AssertionError(f"asked the network for {args}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "config, overrides, told",
    [
        (
            "cifar10",
            [],
            r"data.path=data/cifar10 has no cifar-10-batches-py; torchvision will download it from https://\S+, or n",
        ),
        ("cifar10", ["data.set=cifar100"], r"data.path=data/cifar100 has no \S+; torchvision will download"),
        (
            "cifar10",
            ["data.set=flowers102", "data.size=32"],
            r"imagelabels.mat and \S+, or name a folder that has its images in class folders",
        ),
        (
            CONFIG,
            ["data={name: huggingface, id: somebody/pictures}", *SIZES],
            f"data.id=somebody/pictures is no folder; datasets will download it {HUB}, or name a folder of Parquet",
        ),
        (
            CONFIG,
            ["first_stage={name: autoencoder, model: somebody/vae}", *SIZES],
            f"first_stage.model=somebody/vae is no folder; diffusers will download it {HUB}, or name a folder in",
        ),
        (
            CONFIG,
            ["eval={light_every: 1, extractor: inception}", "train.sample_every=null"],
            r"eval.extractor.weights: \S+ is not in \S+; torch will download it from https://\S+, or name a file",
        ),
        (
            CONFIG,
            ["eval={light_every: 1, extractor: dinov2}"],
            rf"eval.extractor.weights: those of vit_large_patch14_dinov2 .* {HUB} \(timm/\S+\), or name a file",
        ),
        (
            CONFIG,
            ["eval.reference='{name: torchvision, set: stl10, split: train}'"],
            "eval.reference.path=data/stl10 has no stl10_binary; torchvision will",
        ),
    ],
)
def test_a_dry_run_says_what_would_be_downloaded_and_asks_no_network(
    empty_machine, tmp_path, capsys, config, overrides, told
):
    assert cli("train", config, "--dry-run", "--gpu", "H100", *overrides) == 0
    out, err = capsys.readouterr()
    assert re.search(f"note: .*{told}", err) and "# parameters" in out
    assert not list(tmp_path.iterdir())


def test_own_images_that_are_yet_to_be_downloaded_are_refused_by_a_dry_run(empty_machine, capsys):
    assert cli("train", "my_images", "--dry-run", "data.name=huggingface", "data.id=somebody/pictures") == 2
    assert "datasets will download it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "open_it",
    [
        lambda: Autoencoder(AutoencoderConfig(model="somebody/vae")).load(),
        lambda: open_tokenizer(TokenizerConfig(name="somebody/tokenizer")),
        lambda: DATASETS.build(DATASETS.config_class("huggingface")(id="somebody/pictures"), "train"),
    ],
    ids=["autoencoder", "tokenizer", "dataset"],
)
def test_a_hub_that_does_not_answer_is_asked_once_and_the_error_says_so(empty_machine, monkeypatch, open_it):
    asked = []
    monkeypatch.setattr(downloads, "_unanswered", {})
    monkeypatch.setattr(downloads, "_problem_with", lambda url: asked.append(url) or "no network")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"=somebody/.*the Hugging Face Hub does not answer: no network"):
            open_it()
    assert asked == [constants.ENDPOINT]
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(("seconds", "is_offline"), [(0.05, False), (5, True)])
def test_a_slow_hub_is_asked_and_one_that_keeps_silent_is_not(monkeypatch, seconds, is_offline):
    monkeypatch.setattr(downloads, "_unanswered", {})
    monkeypatch.setattr(downloads, "PATIENCE", 0.5)
    monkeypatch.setattr(downloads, "_problem_with", lambda url: time.sleep(seconds))
    with downloads.opening("somebody/vae"):
        assert constants.HF_HUB_OFFLINE is is_offline
