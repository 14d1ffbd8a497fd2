"""Tiny language models whose routers disagree on how many experts a token needs."""

import torch

from dit_moe.experiments.run import TextRun
from dit_moe.experiments.text import TextExperiment, TextSampleConfig
from dit_moe.models import LM, MODELS, LMConfig
from dit_moe.moe import MoEConfig, routers_of
from dit_moe.moe.routers.dtopp import DTopPConfig
from dit_moe.moe.routers.topk import TopKConfig
from dit_moe.text.sequences import TokensConfig
from dit_moe.text.tokenizer import TokenizerConfig, open_tokenizer

ROUTERS = {"dtopp": DTopPConfig(), "layerwise": DTopPConfig(layerwise=True), "topk": TopKConfig(renormalize=False)}
ROUTERS["topk_drn"] = TopKConfig(drn=True)
ROUTERS["heavy"] = DTopPConfig(balance_loss=1.0, dynamic_loss=0.3, z_loss=0.1)  # whose loss terms tell


def tiny_config(router="dtopp", **changes) -> LMConfig:
    shape = {"depth": 2, "width": 32, "heads": 4, "mlp_hidden": 64, "vocab_size": 320, "max_length": 128}
    moe = None if router is None else MoEConfig(**{"router": ROUTERS[router]} | changes.pop("moe", {}))
    name = "LM-custom" if router is None else "LM-custom-8E2A"
    return LMConfig(name=name, moe=moe, init_std=0.2, **shape | changes)  # wide, so that tokens matter


def tiny_lm(router="dtopp", **changes) -> LM:
    """In evaluation mode; every buffer of its routers has a value of its own."""
    torch.manual_seed(0)
    lm = MODELS.build(tiny_config(router, **changes)).eval()
    for layer, each in enumerate(routers_of(lm)):
        each.load_E.uniform_()
        if each.theta is not None:
            torch.nn.init.constant_(each.theta, 1.7)
        if hasattr(each, "controller"):
            each.controller.u.fill_(0.9609 + 0.7961 * layer)
            each.controller.error_sum.fill_(0.123456789012345)
    return lm


def tokens(batch=2, length=24, vocab=257) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(1))


def tiny_run(folder, lm=None) -> TextRun:
    lm = tiny_lm() if lm is None else lm
    data = TokensConfig(path="tokens", length=lm.config.max_length)
    return TextRun(
        folder=folder / "checkpoints" / "7",
        home=folder,
        step=7,
        sha256="0" * 64,
        experiment=TextExperiment(model=lm.config, data=data, sample=TextSampleConfig()),
        model=lm,
        tokenizer=open_tokenizer(TokenizerConfig()),
        trained_on={},
    )
