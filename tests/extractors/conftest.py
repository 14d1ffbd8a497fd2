from __future__ import annotations

import pytest
import torch

from dit_moe import downloads
from tests.extractors.random_networks import random_dinov2, save_random_inception


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    """No test knows what did not answer another."""
    monkeypatch.setattr(downloads, "_unanswered", {})


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file of random weights for Inception."""
    return save_random_inception(tmp_path_factory.mktemp("inception") / "random.pth")


@pytest.fixture(scope="session")
def dinov2_weights(tmp_path_factory):
    """A file of random weights for the smallest DINOv2."""
    path = tmp_path_factory.mktemp("dinov2") / "dinov2_vits14_pretrain.pth"
    torch.save(random_dinov2(), path)
    return path
