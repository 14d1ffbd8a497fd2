"""What every objective promises, over the whole registry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_moe.diffusion import OBJECTIVES, SAMPLERS, Network, Objective
from dit_moe.randomness import BatchRandom

everywhere = pytest.mark.parametrize("name", OBJECTIVES.names())
NULL = 10


def objective_for(name: str, **options) -> Objective:
    return OBJECTIVES.build(OBJECTIVES.config_class(name)(**options), num_classes=NULL)


def network_for(objective: Objective, seen: list[Tensor] | None = None) -> Network:
    """Passes its input through, with as many channels as the objective wants; notes what it was given."""

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if seen is not None:
            seen.extend([x, t, y])
        return torch.cat([x, x], 1) if objective.learns_sigma else x

    return network


@pytest.fixture
def batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"latents": torch.randn(16, 3, 4, 4, generator=g), "labels": torch.randint(NULL, (16,), generator=g)}


@everywhere
def test_default_sampler_fits(name: str) -> None:
    assert SAMPLERS.config_class(objective_for(name).default_sampler).objective == name


@everywhere
def test_the_host_never_waits_for_a_value_on_the_device(name: str, batch) -> None:
    """Tensors on "meta" have no values: whoever asks for one there gets an error."""
    objective = objective_for(name)
    network, on_meta = network_for(objective), {key: value.to("meta") for key, value in batch.items()}
    scalars = objective(network, on_meta, BatchRandom(0, total=16))
    assert {value.device.type for value in scalars.values()} == {"meta"}


@everywhere
def test_a_network_that_asks_for_it_is_told_what_it_ought_to_say(name: str, batch) -> None:
    objective = objective_for(name)

    class Network:
        wants_target = True

        def __call__(self, x: Tensor, t: Tensor, y: Tensor, target: Tensor) -> Tensor:
            return torch.cat([target, x], 1) if objective.learns_sigma else target

    assert objective(Network(), batch, BatchRandom(0, total=16))["mse"] == 0


@everywhere
def test_only_the_loss_carries_a_gradient(name: str, batch) -> None:
    objective, scale = objective_for(name), torch.ones((), requires_grad=True)
    network = network_for(objective)
    scalars = objective(lambda *inputs: network(*inputs) * scale, batch, BatchRandom(0, total=16))
    assert {key for key, value in scalars.items() if value.requires_grad} == {"loss"}
    assert all(value.shape == () for value in scalars.values())
    scalars["loss"].backward()
    assert scale.grad.isfinite()
    assert scale.grad != 0


@everywhere
def test_losses_are_fp32_when_everything_else_is_bf16(name: str, batch) -> None:
    objective = objective_for(name)
    network, low = network_for(objective), {**batch, "latents": batch["latents"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        scalars = objective(lambda *inputs: network(*inputs).bfloat16(), low, BatchRandom(0, total=16))
    assert all(value.dtype == torch.float32 and value.isfinite() for value in scalars.values())


@everywhere
def test_micro_batches_see_the_draws_of_the_whole_batch(name: str, batch) -> None:
    objective = objective_for(name, label_dropout=0.5)

    def seen(start: int, stop: int) -> list[Tensor]:
        inputs: list[Tensor] = []
        part = {key: value[start:stop] for key, value in batch.items()}
        objective(network_for(objective, inputs), part, BatchRandom(0, total=16, start=start, stop=stop))
        return inputs

    parts = zip(seen(0, 5), seen(5, 16), strict=True)
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(seen(0, 16), parts, strict=True))


@everywhere
@pytest.mark.parametrize(("probability", "dropped"), [(0.0, 0), (0.25, 0.25), (1.0, 1)])
def test_label_dropout_gives_its_share_the_null_label(name: str, probability: float, dropped: float) -> None:
    seen: list[Tensor] = []
    objective = objective_for(name, label_dropout=probability)
    batch = {"latents": torch.zeros(20_000, 1, 1, 1), "labels": torch.arange(20_000) % NULL}
    objective(network_for(objective, seen), batch, BatchRandom(0, total=20_000))
    labels = seen[2]
    assert labels.dtype == torch.int64
    assert (labels == NULL).float().mean() == pytest.approx(dropped, abs=0.0155)  # 5 standard errors
    assert torch.equal(labels[labels != NULL], batch["labels"][labels != NULL])


@everywhere
def test_the_network_is_told_the_place_at_which_it_is_shown_noise(name: str, batch) -> None:
    objective, x0 = objective_for(name), batch["latents"]
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    for place in (0.0, 0.25, 0.75, 1.0):
        x, t_B = objective.noisy_at(x0, eps, place)
        assert x.shape == x0.shape and t_B.shape == (16,)
        assert objective.place(t_B[0].item()) == pytest.approx(place, abs=2e-3)  # the last of 1000 levels is at 0.999
    torch.testing.assert_close(x, eps, atol=0.05, rtol=0)  # at the noise


@everywhere
def test_channels_that_the_objective_does_not_use_are_ignored(name: str, batch) -> None:
    objective = objective_for(name, **({"variance": "fixed_small"} if name == "ddpm" else {}))
    narrow = objective(lambda x, t, y: x, batch, BatchRandom(0, total=16))
    wide = objective(lambda x, t, y: torch.cat([x, x * torch.nan], 1), batch, BatchRandom(0, total=16))
    assert narrow["loss"] == wide["loss"]
