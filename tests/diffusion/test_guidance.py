"""Classifier-free guidance."""

import pytest
import torch

from dit_moe.config import ConfigError
from dit_moe.diffusion.guidance import GuidanceConfig, GuidedNetwork

LABELS = torch.tensor([0, 1, 2])
NULL = 9


class Counting:
    """Answers with its label in every channel, twice as many channels as it gets; remembers the batch sizes."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x, t, y):
        self.batches.append(len(x))
        return torch.cat([x, x], 1) * 0 + y.view(-1, 1, 1, 1)


def guided(time: float = 0.5, **options) -> tuple[torch.Tensor, list[int]]:
    model = Counting()
    network = GuidedNetwork(model, LABELS, NULL, GuidanceConfig(**options))
    return network(torch.zeros(3, 4, 2, 2), 7, time)[:, :, 0, 0], model.batches


def test_guided_channels_extrapolate_and_the_rest_is_conditional() -> None:
    output, batches = guided(scale=3.0, channels=3)
    extrapolated = NULL + 3.0 * (LABELS - NULL)
    torch.testing.assert_close(output[:, :3], extrapolated.float()[:, None].expand(3, 3))
    torch.testing.assert_close(output[:, 3:], LABELS.float()[:, None].expand(3, 5))
    assert batches == [6]


def test_by_default_every_latent_channel_is_guided_but_not_the_variance() -> None:
    output, _ = guided(scale=3.0)
    assert torch.equal(output[:, 4:], LABELS.float()[:, None].expand(3, 4))
    assert (output[:, :4] != LABELS[:, None]).all()


def test_scale_zero_ignores_the_label() -> None:
    assert (guided(scale=0.0)[0][:, :4] == NULL).all()


@pytest.mark.parametrize(
    ("options", "time"),
    [
        ({"scale": 1.0}, 0.5),
        ({"scale": 3.0, "interval": (0.2, 0.6)}, 0.61),
        ({"scale": 3.0, "interval": (0.2, 0.6)}, 0.1),
    ],
)
def test_unguided_evaluations_see_only_the_conditional_half(options: dict, time: float) -> None:
    output, batches = guided(time, **options)
    assert batches == [3]
    assert torch.equal(output, LABELS.float()[:, None].expand(3, 8))


@pytest.mark.parametrize("time", [0.2, 0.6, 3 * 0.2, torch.tensor(0.6).item()])  # 3 · 0.2 rounds up
def test_interval_includes_its_ends_however_they_are_rounded(time: float) -> None:
    assert guided(time, scale=2.0, interval=(0.2, 0.6))[1] == [6]


def test_network_time_keeps_its_kind() -> None:
    seen = []
    network = GuidedNetwork(lambda x, t, y: seen.append(t) or x, LABELS, NULL, GuidanceConfig())
    network(torch.zeros(3, 4, 2, 2), 999, 1.0)
    network(torch.zeros(3, 4, 2, 2), 999.0, 1.0)
    assert [t.dtype for t in seen] == [torch.int64, torch.float32]


def test_more_guided_than_latent_channels_is_an_error() -> None:
    with pytest.raises(ConfigError, match="channels=5 exceeds the 4 channels of the latents"):
        guided(scale=2.0, channels=5)
