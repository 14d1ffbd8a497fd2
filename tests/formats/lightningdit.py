"""LightningDiT's forward pass, from its weights by their own names, and such weights drawn at random.

Written from what is published of it, and from nothing of ours: rotations are complex numbers, norms are spelt out.
"""

# B batch, S tokens = G·G, D width, H heads, Q width of a head

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """The options of the original that its weights can be told apart by, and those that they cannot."""

    width: int = 48
    depth: int = 2
    heads: int = 4
    patch: int = 1
    size: int = 6
    channels: int = 5
    classes: int = 7
    swiglu: bool = True
    rope: bool = True
    rms_norm: bool = True
    qk_norm: bool = False
    learn_sigma: bool = False

    @property
    def side(self) -> int:
        return self.size // self.patch

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Of every tensor of a checkpoint but the tables of angles."""
    d, p2 = shape.width, shape.patch**2
    hidden = 4 * d * 2 // 3 if shape.swiglu else 4 * d
    outputs = shape.channels * (2 if shape.learn_sigma else 1)
    linears = {"t_embedder.mlp.0": (256, d), "t_embedder.mlp.2": (d, d)}
    linears |= {"final_layer.linear": (d, p2 * outputs), "final_layer.adaLN_modulation.1": (d, 2 * d)}
    vectors = {"final_layer.norm_final.weight": d} if shape.rms_norm else {}
    for block in (f"blocks.{index}" for index in range(shape.depth)):
        linears |= {f"{block}.attn.qkv": (d, 3 * d), f"{block}.attn.proj": (d, d)}
        linears |= {f"{block}.adaLN_modulation.1": (d, 6 * d)}
        first, second = ("w12", "w3") if shape.swiglu else ("fc1", "fc2")
        into = 2 * hidden if shape.swiglu else hidden
        linears |= {f"{block}.mlp.{first}": (d, into), f"{block}.mlp.{second}": (hidden, d)}
        if shape.rms_norm:
            vectors |= {f"{block}.norm1.weight": d, f"{block}.norm2.weight": d}
        for norm in (f"{block}.attn.{which}_norm" for which in ("q", "k") if shape.qk_norm):
            vectors |= {f"{norm}.weight": shape.head_dim}
            vectors |= {} if shape.rms_norm else {f"{norm}.bias": shape.head_dim}
    shapes = {
        "pos_embed": (1, shape.side**2, d),
        "x_embedder.proj.weight": (d, shape.channels, shape.patch, shape.patch),
    }
    shapes |= {"x_embedder.proj.bias": (d,), "y_embedder.embedding_table.weight": (shape.classes + 1, d)}
    shapes |= {f"{name}.weight": (o, i) for name, (i, o) in linears.items()}
    return (
        shapes
        | {f"{name}.bias": (o,) for name, (_, o) in linears.items()}
        | {name: (n,) for name, n in vectors.items()}
    )


def random_weights(shape: Shape, seed: int = 0) -> Weights:
    """Every tensor of a checkpoint, with no weight left at zero or one."""
    random, shapes = torch.Generator().manual_seed(seed), tensor_shapes(shape)
    weights = {name: 0.2 * torch.randn(size, generator=random) for name, size in shapes.items()}
    weights = {name: 1 + each if "norm" in name and name.endswith("weight") else each for name, each in weights.items()}
    if shape.rope:
        weights |= {"feat_rope.freqs_cos": angles(shape).cos(), "feat_rope.freqs_sin": angles(shape).sin()}
    return weights


def on_meta(shape: Shape) -> Weights:
    """A checkpoint's tensors without numbers."""
    shapes = tensor_shapes(shape)
    shapes |= {f"feat_rope.freqs_{which}": (shape.side**2, shape.head_dim) for which in ("cos", "sin") if shape.rope}
    return {name: torch.empty(size, device="meta") for name, size in shapes.items()}


def angles(shape: Shape) -> Tensor:
    """What the original keeps the cosine and sine of, [S, Q]: each angle twice, those of the row first."""
    pairs = shape.head_dim // 4
    steps = [10000.0 ** (-pair / pairs) for pair in range(pairs)]
    table = []
    for row in range(shape.side):
        for column in range(shape.side):
            table.append([place * step for place in (row, column) for step in steps for _ in range(2)])
    return torch.tensor(table)


def forward(shape: Shape, w: Weights, x: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
    """Velocity towards the data [B, C, size, size] at the times `t_B`, 1 being data."""
    tokens = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=shape.patch)
    x_BSD = tokens.flatten(2).mT + w["pos_embed"]
    rates = torch.tensor([math.exp(-math.log(10000) * i / 128) for i in range(128)])
    waves = torch.outer(t_B, rates)
    time = linear(w, "t_embedder.mlp.0", torch.cat([waves.cos(), waves.sin()], 1))
    c_BD = linear(w, "t_embedder.mlp.2", F.silu(time)) + w["y_embedder.embedding_table.weight"][y_B]
    for index in range(shape.depth):
        block = f"blocks.{index}"
        modulation = linear(w, f"{block}.adaLN_modulation.1", F.silu(c_BD))[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
        h_BSD = norm(w, f"{block}.norm1", x_BSD, 1e-6) * (1 + scale1) + shift1
        x_BSD = x_BSD + gate1 * attention(shape, w, f"{block}.attn", h_BSD)
        h_BSD = norm(w, f"{block}.norm2", x_BSD, 1e-6) * (1 + scale2) + shift2
        x_BSD = x_BSD + gate2 * feed_forward(shape, w, f"{block}.mlp", h_BSD)
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", F.silu(c_BD))[:, None].chunk(2, -1)
    out = linear(w, "final_layer.linear", norm(w, "final_layer.norm_final", x_BSD, 1e-6) * (1 + scale) + shift)
    patches = out.view(len(x), shape.side, shape.side, shape.patch, shape.patch, -1)
    return torch.einsum("bijpqc->bcipjq", patches).reshape(len(x), -1, shape.size, shape.size)[:, : shape.channels]


def attention(shape: Shape, w: Weights, name: str, x_BSD: Tensor) -> Tensor:
    parts = linear(w, f"{name}.qkv", x_BSD).view(*x_BSD.shape[:2], 3, shape.heads, shape.head_dim).unbind(2)
    q, k, v = (part.transpose(1, 2) for part in parts)
    if shape.qk_norm:
        eps = 1e-6 if shape.rms_norm else 1e-5
        q, k = norm(w, f"{name}.q_norm", q, eps), norm(w, f"{name}.k_norm", k, eps)
    if shape.rope:
        turn = torch.polar(torch.ones(1), angles(shape)[:, ::2])
        q, k = (
            torch.view_as_real(torch.view_as_complex(each.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
            for each in (q, k)
        )
    chances = (q @ k.mT / shape.head_dim**0.5).softmax(-1)
    return linear(w, f"{name}.proj", (chances @ v).transpose(1, 2).flatten(2))


def feed_forward(shape: Shape, w: Weights, name: str, x_BSD: Tensor) -> Tensor:
    if not shape.swiglu:
        h = linear(w, f"{name}.fc1", x_BSD)
        bent = 0.5 * h * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3)))
        return linear(w, f"{name}.fc2", bent)
    gate, up = linear(w, f"{name}.w12", x_BSD).chunk(2, -1)
    return linear(w, f"{name}.w3", gate * torch.sigmoid(gate) * up)


def norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    """RMS norm where there is only a weight, LayerNorm where there is also a bias, or neither."""
    weight, bias = w.get(f"{name}.weight"), w.get(f"{name}.bias")
    if weight is not None and bias is None:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x if weight is None or bias is None else x * weight + bias


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def guided_samples(
    shape: Shape,
    w: Weights,
    noise: Tensor,
    y_B: Tensor,
    times: int,
    scale: float,
    shift: float = 0.3,
    start: float = 0.125,
) -> Tensor:
    """Euler's method over so many times from 0, noise, to 1: guidance on three channels, from the time `start` on."""
    null_B, x = torch.full_like(y_B, shape.classes), noise
    grid = [shift * t / (1 + (shift - 1) * t) for t in torch.linspace(0, 1, times).tolist()]
    for now, later in pairwise(grid):
        t_B = torch.full((len(x),), now)
        velocity, unguided = forward(shape, w, x, t_B, y_B), forward(shape, w, x, t_B, null_B)
        if now >= start:
            guided = unguided[:, :3] + scale * (velocity[:, :3] - unguided[:, :3])
            velocity = torch.cat([guided, velocity[:, 3:]], 1)
        x = x + (later - now) * velocity
    return x
