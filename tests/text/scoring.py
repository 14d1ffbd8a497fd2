"""A small network with experts, and documents of all lengths, for the tests of scoring."""

import random

import torch
from torch import nn

from dit_moe.models import MODELS, LMConfig
from dit_moe.moe import MoEConfig, routers_of
from dit_moe.moe.routers.dtopp import DTopPConfig
from dit_moe.moe.routing import threshold_u

EOS, VOCAB, LENGTH = 256, 320, 16
HOW = {"eos": EOS, "length": LENGTH, "vocab_size": VOCAB}


def network(dense: bool = False):
    """Random, and far from indifferent; experts by a threshold."""
    torch.manual_seed(0)
    name = "LM-custom" if dense else "LM-custom-4E2A"
    moe = None if dense else MoEConfig(router=DTopPConfig())
    sizes = {"depth": 2, "width": 32, "heads": 2, "mlp_hidden": 64, "vocab_size": VOCAB, "max_length": LENGTH}
    model = MODELS.build(LMConfig(name=name, init_std=0.3, moe=moe, **sizes))
    for router in routers_of(model):
        router.controller.restart(threshold_u(0.6))
    return model.eval()


def documents(count: int = 40) -> list[tuple[list[int], int]]:
    """From none to 70 tokens."""
    draw = random.Random(0)
    lengths = [70, 1, 0, LENGTH, LENGTH + 1, *(draw.randint(1, 70) for _ in range(count - 5))]
    return [([draw.randrange(256) for _ in range(length)], length + 1) for length in lengths]


class Uniform(nn.Module):
    """Knows nothing: every token costs ln V."""

    def __init__(self):
        super().__init__()
        self.here = nn.Parameter(torch.zeros(()))

    def forward(self, tokens):
        return torch.zeros(*tokens.shape, VOCAB) + self.here
