"""Statistics of routing that no network made: with structure that the pictures should show."""

# L layers, E experts, T noise levels, C classes, S positions, M images, W tokens, V kinds, U steps

from dataclasses import fields, replace
from typing import Any

import numpy as np

from dit_moe.analysis.statistics import Examples, Passage, RoutingStats, Target, TokenKinds
from dit_moe.training.curves import RouterCurves

WORDS = ["the", " cat", "\n", "<b>", "$x$", " sat", ",", "&amp;", "中", " on", "'", '"', " mat", ".", "😀", " a"]


def normalised(array: np.ndarray) -> np.ndarray:
    return array / array.sum(-1, keepdims=True)


def made(layers: int, experts: int, places: int, seed: int, target: float) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    active_L = target + 0.45 * target * np.sin(np.linspace(0, 3.3, layers)) - 0.3 * target
    number = np.arange(1, experts + 1)
    share_LE = normalised(np.exp(-((number - active_L[:, None]) ** 2) / 1.2))
    load_LE = normalised(random.gamma(6.0, size=(layers, experts)))
    use_LE = np.clip(load_LE * active_L[:, None], 0, 1)
    affinity = 1 + 0.8 * np.cos(2 * np.pi * (number[:, None] - number) * 3 / experts)
    together_LEE = np.clip(use_LE[:, :, None] * use_LE[:, None, :] * affinity, 0, 1)
    together_LEE[:, np.arange(experts), np.arange(experts)] = use_LE
    side = places**0.5
    row, column = np.divmod(np.arange(places), side)
    centre_S = np.exp(-((row - side / 2) ** 2 + (column - side / 2) ** 2) / side)
    return {
        "layers_L": list(range(layers)),
        "experts": experts,
        "target": Target(target),
        "trained_target": Target(target),
        "active_L": active_L,
        "active_std_L": np.full(layers, 0.6),
        "share_LE": share_LE,
        "load_LE": load_LE,
        "together_LEE": together_LEE,
        "active_LS": active_L[:, None] + np.linspace(0.1, 0.7, layers)[:, None] * (centre_S - centre_S.mean()),
    }


def training(layers: int, steps: int, target: float) -> RouterCurves:
    random = np.random.default_rng(1)
    step_U = np.arange(1, steps + 1) * 5
    p_U = 0.85 - 0.35 * np.exp(-step_U / 200)
    active_LU = target + np.linspace(-0.5, 0.5, layers)[:, None] * (1 - np.exp(-step_U / 300))
    active_LU = active_LU + 0.05 * random.standard_normal((layers, steps))
    theta_LU = 1 + np.linspace(0.2, 0.6, layers)[:, None] * (1 - np.exp(-step_U / 500))
    return RouterCurves(
        step_U=step_U,
        active_U=active_LU.mean(0),
        active_LU=active_LU,
        p_LU=np.tile(p_U, (layers, 1)),
        theta_LU=theta_LU,
    )


def images(
    *, layers: int = 4, experts: int = 8, times: int = 6, classes: int = 10, side: int = 4, target: float = 2.0
) -> RoutingStats:
    """As of a diffusion model's run."""
    random = np.random.default_rng(0)
    fields = made(layers, experts, side * side, 0, target)
    times_T = np.linspace(0.05, 0.95, times)
    slope_L = np.linspace(-0.3, 0.5, layers)
    active_LT = fields["active_L"][:, None] + slope_L[:, None] * (times_T - 0.5)
    place_E = random.permutation(np.linspace(0, 1, experts))
    load_LTE = normalised(fields["load_LE"][:, None] * np.exp(-2 * (times_T[:, None] - place_E) ** 2))
    load_LCE = normalised(fields["load_LE"][:, None] * random.gamma(9.0, size=(layers, classes, experts)))
    pixels, count = 8 * side, 3
    ramp = np.linspace(0, 255, pixels)
    clean = np.broadcast_to((ramp[:, None] + ramp) / 2, (count, pixels, pixels))[..., None].astype(np.uint8)
    grain = random.integers(0, 256, (count, times, pixels, pixels, 1))
    noisy = ((1 - times_T[:, None, None, None]) * clean[:, None] + times_T[:, None, None, None] * grain).astype(
        np.uint8
    )
    active_MTLS = fields["active_LS"] + slope_L[:, None] * (times_T - 0.5)[:, None, None] + np.zeros((count, 1, 1, 1))
    return RoutingStats(
        kind="images",
        facts={"run": "runs/made-up", "step": 600, "router": "dtopp", "weights": "ema", "versions": {"torch": "2.11"}},
        **fields,
        times_T=times_T,
        active_LT=active_LT,
        load_LTE=load_LTE,
        class_names_C=[str(index) for index in range(classes)],
        images_C=np.full(classes, 45),
        shuffled_LCE=normalised(fields["load_LE"][:, None] * random.gamma(400.0, size=(layers, classes, experts))),
        active_LC=fields["active_L"][:, None] + 0.15 * random.standard_normal((layers, classes)),
        load_LCE=load_LCE,
        examples=Examples(
            times_T=times_T,
            images_MHWC=clean,
            noisy_MTHWC=noisy,
            active_MTLS=active_MTLS,
            classes_M=["3", "tench, Tinca tinca", "<7>"],
        ),
        training=training(layers, 300, target),
    )


def text(*, layers: int = 6, experts: int = 8, bins: int = 64, target: float = 2.0) -> RoutingStats:
    """As of a language model's run."""
    random = np.random.default_rng(2)
    fields = made(layers, experts, bins, 3, target)
    fields["active_LS"] = fields["active_L"][:, None] + 0.5 * np.exp(-np.arange(bins) / 9)
    words = [WORDS[index] for index in random.integers(0, len(WORDS), 300)]
    kinds = len(WORDS)
    return RoutingStats(
        kind="text",
        facts={"run": "runs/made-up-lm", "step": 400, "router": "dtopp"},
        **fields,
        position_S=np.arange(bins) * 4,
        tokens_S=np.linspace(2000, 400, bins).astype(int),
        tokens=TokenKinds(
            tokens_V=[word.replace(" ", "␣").replace("\n", "↵") for word in WORDS],
            count_V=np.arange(1000, 1000 - kinds, -1),
            load_LVE=normalised(fields["load_LE"][:, None] * random.gamma(9.0, size=(layers, kinds, experts))),
            active_LV=fields["active_L"][:, None] + 0.3 * random.standard_normal((layers, kinds)),
        ),
        passage=Passage(
            tokens_W=words,
            active_LW=np.clip(
                np.round(fields["active_L"][:, None] + random.standard_normal((layers, 300))), 1, experts
            ),
        ),
        training=training(layers, 80, target),
    )


def bare(stats: RoutingStats) -> RoutingStats:
    """The same, without anything optional."""
    positions = ("position_S", "tokens_S")  # text has always these
    optional = {each.name: None for each in fields(stats) if each.default is None and each.name not in positions}
    return replace(stats, **optional, class_names_C=[])
