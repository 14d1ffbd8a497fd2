"""Published results, to stand beside one's own: class-conditional ImageNet, 50 000 images, ADM's evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """One row of a paper's table; None where the source, as we have it, does not say."""

    model: str
    source: str
    router: str | None = None
    parameters: float | None = None
    active_parameters: float | None = None  # per token
    steps: int | None = None  # of training
    batch: int | None = None  # images of a training step
    objective: str
    sampler: str  # with its steps
    evaluations: int | None = None  # of the network per image; a guided one counts as 2
    guidance: float | None = 1.0  # 1: none; None: of another kind, see `note`
    channels: int | None = None  # that are guided, of the latents' 4; None: all, or not stated
    interval: tuple[float, float] | None = None  # of guided times, t=1 being noise; None: all, or not stated
    fid: float
    sfid: float | None = None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    image_size: int = 256
    note: str | None = None


XL = 675.13e6  # parameters of DiT-XL/2, and of SiT's; as in papers, position embeddings count

_dit = partial(
    Baseline,
    source="DiT, arXiv 2212.09748",
    router="dense",
    steps=400_000,
    batch=256,
    objective="ddpm",
    sampler="ddpm 250",
    evaluations=250,
)
_flow = partial(Baseline, objective="flow", sampler="euler 250", evaluations=250)
_diffmoe = partial(_flow, source="DiffMoE, arXiv 2503.14487", steps=700_000)
_promoe = partial(_flow, source="ProMoE, ICLR 2026", router="promoe", steps=500_000, batch=256)
_promoe_guided = partial(_promoe, guidance=1.5, evaluations=500)
_dsmoe = partial(_flow, source="DSMoE (EfficientMoE)", router="dsmoe", steps=700_000)
_rerun = partial(_dsmoe, router="diffmoe", note="DiffMoE as trained and measured by DSMoE's authors")

BASELINES = (
    _dit(
        model="DiT-XL/2",
        parameters=XL,
        steps=7_000_000,
        evaluations=500,
        guidance=1.5,
        channels=3,
        fid=2.27,
        inception_score=278.2,
    ),
    _dit(model="DiT-XL/2", parameters=XL, fid=18.1, note="lowest of several published values, up to 19.5"),
    _dit(model="DiT-XL/2", parameters=XL, fid=19.5, note="highest of several published values, down to 18.1"),
    _dit(model="DiT-L/2", parameters=458.10e6, fid=23.3),
    _dit(model="DiT-B/2", parameters=130.51e6, fid=43.5),
    _dit(model="DiT-B/4", parameters=130.48e6, fid=68.4),
    _dit(model="DiT-S/2", parameters=32.96e6, fid=68.4),
    _flow(
        model="SiT-XL/2",
        source="SiT, arXiv 2401.08740",
        router="dense",
        parameters=XL,
        steps=7_000_000,
        batch=256,
        sampler="euler_maruyama 250",
        evaluations=500,
        guidance=1.5,
        channels=3,
        fid=2.06,
        inception_score=270.3,
    ),
    _flow(
        model="REPA SiT-XL/2",
        source="REPA, arXiv 2410.06940",
        router="dense",
        parameters=XL,  # of what samples
        steps=4_000_000,
        batch=256,
        sampler="euler_maruyama 250",
        evaluations=None,
        guidance=1.8,
        interval=(0.0, 0.7),
        fid=1.42,
    ),
    _flow(
        model="LightningDiT-XL/1",
        source="LightningDiT, arXiv 2501.01423",
        router="dense",
        batch=1024,
        evaluations=None,
        guidance=6.7,
        fid=1.35,
        note="800 epochs; guided on an interval of times",
    ),
    _diffmoe(model="DiffMoE-L-E8", router="diffmoe", steps=7_000_000, sampler="250 steps", fid=9.60),
    _diffmoe(model="DiffMoE-L-E8", router="diffmoe", steps=7_000_000, objective="ddpm", sampler="ddpm 250", fid=9.17),
    _diffmoe(model="DiffMoE-L-E16", router="diffmoe", fid=14.41),
    _diffmoe(model="DiT-L", router="dense", fid=17.01),
    _diffmoe(model="DiT-L, token choice", router="topk", fid=19.06),
    _diffmoe(model="DiT-L, expert choice", router="expert choice", fid=16.12),
    _promoe(model="ProMoE-B", fid=24.44, inception_score=60.4),
    _promoe(model="ProMoE-L", fid=11.61, inception_score=100.8),
    _promoe(model="ProMoE-XL", fid=9.44, inception_score=114.9),
    _promoe_guided(model="ProMoE-B", fid=6.39, inception_score=154),
    _promoe_guided(model="ProMoE-L", fid=2.79, inception_score=244),
    _promoe_guided(model="ProMoE-XL", fid=2.59, inception_score=266),
    _dsmoe(model="DSMoE-S-E16", fid=39.84),
    _dsmoe(model="DSMoE-B-E16", fid=20.33),
    _dsmoe(model="DSMoE-L-E16", fid=9.80),
    _dsmoe(model="DSMoE-3B-E16", fid=7.52),
    _rerun(model="DiffMoE-S-E16", fid=41.02),
    _rerun(model="DiffMoE-B-E16", fid=20.83),
    _rerun(model="DiffMoE-L-E16", fid=11.16),
    Baseline(
        model="EDM2-XXL",
        source="EDM2, arXiv 2312.02696, guided as in arXiv 2406.02507",
        router="dense",
        objective="edm",
        sampler="heun 32",
        guidance=None,
        fid=1.25,
        image_size=512,
        note="autoguidance",
    ),
)
