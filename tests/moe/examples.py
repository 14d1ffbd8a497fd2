"""Routers, tokens and what a model tells its routers, for tests."""

from dataclasses import replace

import torch

from dit_moe.moe import ROUTERS, Router, RoutingContext

WIDTH, EXPERTS, SAMPLES, TOKENS = 16, 8, 5, 40
NULL = 3


def make(name: str, target: float = 2, experts: int = EXPERTS, **options) -> Router:
    """With logits of unit variance, as after some training, and without options that mean nothing to it."""
    torch.manual_seed(0)
    config_class = ROUTERS.config_class(name)
    options = {"init_std": WIDTH**-0.5} | options
    config = config_class(**{key: value for key, value in options.items() if key not in config_class.UNUSED})
    return ROUTERS.build(config, WIDTH, experts, target)


def tokens(seed: int = 1, count: int = TOKENS) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def context(samples: int = SAMPLES, count: int = TOKENS) -> RoutingContext:
    """What a DiT tells its routers; the second sample is without a class."""
    labels = torch.arange(samples) % 3
    labels[1:2] = NULL
    unmodulated, time = tokens(7, count), tokens(8, samples)
    return RoutingContext(samples=samples, labels_B=labels, null_label=NULL, time_BD=time, unmodulated_ND=unmodulated)


def of_sample(whole: RoutingContext, b: int) -> RoutingContext:
    """The context of one of its samples alone."""
    own = slice(b * TOKENS // SAMPLES, (b + 1) * TOKENS // SAMPLES)
    return replace(
        whole,
        samples=1,
        labels_B=whole.labels_B[b : b + 1],
        time_BD=whole.time_BD[b : b + 1],
        unmodulated_ND=whole.unmodulated_ND[own],
        earlier_NE=None if whole.earlier_NE is None else whole.earlier_NE[own],
    )


def mask_of(routing, count: int = TOKENS, experts: int = EXPERTS) -> torch.Tensor:
    mask = torch.zeros(count, experts, dtype=torch.bool)
    mask[routing.token_R, routing.expert_R] = True
    return mask


def backward(loss: torch.Tensor) -> None:
    """Nothing if no parameter takes part, as with a router that learns nothing."""
    if loss.requires_grad:
        loss.backward()


def after_another(router: Router, whole: RoutingContext) -> RoutingContext:
    """Of the same tokens in a second layer, with what the first one hands on."""
    return replace(whole, earlier_NE=router(tokens(2), whole).handed_on_NE)


def step(router: Router, *batches: tuple[torch.Tensor, RoutingContext]) -> None:
    """An optimizer step of a router by itself, over micro-batches."""
    for batch in batches:
        router(*batch)
    router.after_step(router.stats, router.stats)
    router.stats.reset()
