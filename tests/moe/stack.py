"""A few MoE layers in a row: what steering and calibration are tested on."""

import torch
from torch import nn

from dit_moe.moe import MoEConfig, MoELayer, routers_of
from dit_moe.moe.routers.dtopp import DTopPConfig

WIDTH = 16


def stack(router=None, layers: int = 3, experts: int = 8, target: float = 2.0, **options) -> nn.Sequential:
    torch.manual_seed(0)
    config = MoEConfig(experts=experts, target=target, router=router or DTopPConfig(), **options)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = MoELayer(config, WIDTH, 32)

        def forward(self, x):
            return x + self.layer(x)[0]

    return nn.Sequential(*[Residual() for _ in range(layers)])


def batch(seed: int = 0, tokens: int = 256) -> torch.Tensor:
    return torch.randn(4, tokens // 4, WIDTH, generator=torch.Generator().manual_seed(seed))


def thresholds(model) -> list[float]:
    return [router.controller.p.item() for router in routers_of(model)]
