"""Networks of other suites in a few lines of float64 each, on state dicts under those suites' own names.

Written from what is published of them, and with nothing of ours, so that an import can be held against them.
"""

# B batch, C channels, S tokens, D width, E experts, H hidden width

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, DEPTH, HEADS, EXPERTS, CHANNELS, PATCH, SIDE = 48, 4, 3, 4, 4, 2, 4  # SIDE is of the grid of tokens
State = dict[str, Tensor]
FeedForward = Callable[[State, Tensor, Tensor], Tensor]
"""(weights of a block's feed-forward, tokens [B, S, D], labels [B]) → [B, S, D]."""


class Peer(NamedTuple):
    """How a suite's network differs from DiT."""

    experts: dict[str, tuple[int, ...]]  # names and shapes of an MoE block's feed-forward
    feed_forward: FeedForward
    classes: int = 7
    blocks: tuple[int, ...] = (1, 3)  # those with experts
    act: Callable[[Tensor], Tensor] = lambda x: F.gelu(x, approximate="tanh")  # of dense feed-forwards
    rotary: bool = False
    place: str = "mlp"  # where an MoE block has its feed-forward
    attention: tuple[str, str] = ("qkv", "proj")
    qk_norm_eps: float | None = None  # of a LayerNorm with weights on queries and keys


def random_state(peer: Peer, depth: int = DEPTH) -> State:
    d, patch = WIDTH, CHANNELS * PATCH * PATCH
    shapes: dict[str, tuple[int, ...]] = {} if peer.rotary else {"pos_embed": (1, SIDE * SIDE, d)}
    shapes |= {"x_embedder.proj.weight": (d, CHANNELS, PATCH, PATCH), "x_embedder.proj.bias": (d,)}
    shapes |= _linear("t_embedder.mlp.0", d, 256) | _linear("t_embedder.mlp.2", d, d)
    shapes["y_embedder.embedding_table.weight"] = (peer.classes + 1, d)
    for i in range(depth):
        block = f"blocks.{i}"
        into, out = peer.attention
        shapes |= _linear(f"{block}.attn.{into}", 3 * d, d) | _linear(f"{block}.attn.{out}", d, d)
        for norm in ("q_norm", "k_norm") if peer.qk_norm_eps else ():
            shapes |= {f"{block}.attn.{norm}.{each}": (d // HEADS,) for each in ("weight", "bias")}
        if i in peer.blocks:
            shapes |= {f"{block}.{peer.place}.{name}": shape for name, shape in peer.experts.items()}
        else:
            shapes |= _mlp(f"{block}.mlp", 4 * d)
        shapes |= _linear(f"{block}.adaLN_modulation.1", 6 * d, d)
    shapes |= _linear("final_layer.linear", 2 * patch, d) | _linear("final_layer.adaLN_modulation.1", 2 * d, d)
    random = torch.Generator().manual_seed(3)
    state = {name: 0.5 * torch.randn(shape, generator=random) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    for name in state:
        if name.endswith("embedding_table.weight"):
            state[name] *= WIDTH**0.5
        if name.endswith("expert_threshold"):
            state[name] = torch.linspace(0.4, 0.6, EXPERTS)
        if name.endswith("ema_decay"):
            state[name] = torch.tensor([0.95])
        if name.endswith("e_score_correction_bias"):
            state[name] = torch.zeros(EXPERTS)
    if not peer.rotary:
        state["pos_embed"] = _sincos(d)[None].float()
    return state


def forward(peer: Peer, state: State, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """All 2·C channels, [B, 2C, H, H] in float64; `t` as the embedding of time is given it."""
    state = {name: tensor.double() for name, tensor in state.items()}
    x, t = x.double(), t.double()
    frequency = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    sinusoids = torch.cat([(t[:, None] * frequency).cos(), (t[:, None] * frequency).sin()], dim=1)
    time = _apply(state, "t_embedder.mlp.2", F.silu(_apply(state, "t_embedder.mlp.0", sinusoids)))
    c = F.silu(time + state["y_embedder.embedding_table.weight"][y])
    h = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=PATCH).flatten(2).mT
    if "pos_embed" in state:
        h = h + state["pos_embed"]
    for i in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))):
        own = _below(state, f"blocks.{i}")
        shift1, scale1, gate1, shift2, scale2, gate2 = _apply(own, "adaLN_modulation.1", c)[:, None].chunk(6, dim=2)
        h = h + gate1 * _attention(peer, _below(own, "attn"), _norm(h) * (1 + scale1) + shift1)
        tokens = _norm(h) * (1 + scale2) + shift2
        if i in peer.blocks:
            h = h + gate2 * peer.feed_forward(_below(own, peer.place), tokens, y)
        else:
            h = h + gate2 * _two_layers(_below(own, "mlp"), tokens, peer.act)
    shift, scale = _apply(state, "final_layer.adaLN_modulation.1", c)[:, None].chunk(2, dim=2)
    out = _apply(state, "final_layer.linear", _norm(h) * (1 + scale) + shift)
    out = out.reshape(len(x), SIDE, SIDE, PATCH, PATCH, 2 * CHANNELS)
    return torch.einsum("bhwpqc->bchpwq", out).reshape(len(x), 2 * CHANNELS, SIDE * PATCH, SIDE * PATCH)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _below(state: State, prefix: str) -> State:
    return {name.removeprefix(f"{prefix}."): each for name, each in state.items() if name.startswith(f"{prefix}.")}


def _linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _mlp(name: str, hidden: int, first: str = "fc1", second: str = "fc2") -> dict[str, tuple[int, ...]]:
    return _linear(f"{name}.{first}", hidden, WIDTH) | _linear(f"{name}.{second}", WIDTH, hidden)


def _gated(name: str, hidden: int) -> dict[str, tuple[int, ...]]:
    inner = {f"{name}.{each}_proj.weight": (hidden, WIDTH) for each in ("gate", "up")}
    return {**inner, f"{name}.down_proj.weight": (WIDTH, hidden)}


def _apply(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def _two_layers(state: State, x: Tensor, act=lambda x: F.gelu(x, approximate="tanh"), names=("fc1", "fc2")) -> Tensor:
    return _apply(state, names[1], act(_apply(state, names[0], x)))


def _swiglu(state: State, x: Tensor) -> Tensor:
    return _apply(state, "down_proj", F.silu(_apply(state, "gate_proj", x)) * _apply(state, "up_proj", x))


def _sincos(width: int) -> Tensor:
    rate = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    parts = []
    for s in range(SIDE * SIDE):
        row, column = divmod(s, SIDE)
        parts.append(torch.cat([(column * rate).sin(), (column * rate).cos(), (row * rate).sin(), (row * rate).cos()]))
    return torch.stack(parts)


def _attention(peer: Peer, state: State, x: Tensor) -> Tensor:
    batch, count, width = x.shape
    into, out = peer.attention
    q, k, v = _apply(state, into, x).reshape(batch, count, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
    if peer.qk_norm_eps:
        norms = [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in ("q_norm", "k_norm")]
        q, k = (F.layer_norm(z, z.shape[-1:], *norm, peer.qk_norm_eps) for z, norm in zip((q, k), norms, strict=True))
    if peer.rotary:
        q, k = _turned(q), _turned(k)
    weight = (q @ k.mT / (width // HEADS) ** 0.5).softmax(-1)
    return _apply(state, out, (weight @ v).transpose(1, 2).reshape(batch, count, width))


def _turned(x: Tensor) -> Tensor:
    """The first half of a head by its row, the second by its column; in each, pairs lie a quarter of a head apart."""
    quarter = x.shape[-1] // 4
    rate = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.arange(SIDE * SIDE) // SIDE, torch.arange(SIDE * SIDE) % SIDE
    halves = []
    for half, place in zip(x.chunk(2, dim=-1), (row, column), strict=True):
        angle = place[:, None] * rate
        first, second = half.chunk(2, dim=-1)
        halves += [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
    return torch.cat(halves, dim=-1)


# ----------------------------------------------------------------------------------------- feed-forwards with experts


def _expert(state: State, e: int) -> State:
    return _below(state, f"experts.{e}")


def dit_moe(state: State, x: Tensor, y: Tensor) -> Tensor:
    """The two best by softmax, weighted by it as it is. One shared expert of half the width."""
    out, score = _swiglu(_below(state, "shared_experts"), x), _apply(state, "gate", x).softmax(-1)
    for b in range(x.shape[0]):
        for s in range(x.shape[1]):
            for e in score[b, s].argsort(descending=True)[:2].tolist():
                out[b, s] += score[b, s, e] * _swiglu(_expert(state, e), x[b, s])
    return out


def token_choice(state: State, x: Tensor, y: Tensor) -> Tensor:
    """The best expert by softmax, weighted by it."""
    out = torch.zeros_like(x)
    score = _apply(state, "gate", x).softmax(-1)
    for b in range(x.shape[0]):
        for s in range(x.shape[1]):
            e = int(score[b, s].argmax())
            out[b, s] = score[b, s, e] * _two_layers(_expert(state, e), x[b, s])
    return out


def expert_choice(state: State, x: Tensor, y: Tensor) -> Tensor:
    """Each expert takes S/E tokens of every image."""
    out, score = torch.zeros_like(x), (x @ state["gate_weight"].T).softmax(-1)
    for b in range(x.shape[0]):
        for e in range(EXPERTS):
            for s in score[b, :, e].argsort(descending=True)[: x.shape[1] // EXPERTS].tolist():
                out[b, s] += score[b, s, e] * _two_layers(_expert(state, e), x[b, s])
    return out


def promoe(state: State, x: Tensor, y: Tensor) -> Tensor:
    """By cosine to the prototypes; tokens of the null class go to the last expert. One shared expert."""
    names = ("up_proj", "down_proj")
    out = _two_layers(_below(state, "shared_expert"), x, names=names)
    cosine = F.normalize(x, dim=-1) @ F.normalize(state["cluster_centers"], dim=-1).T
    for b in range(x.shape[0]):
        for s in range(x.shape[1]):
            e, gate = (EXPERTS - 1, 1.0) if y[b] == 1000 else (int(cosine[b, s].argmax()), cosine[b, s].max())
            out[b, s] += gate * _two_layers(_expert(state, e), x[b, s], names=names)
    return out


def dsmoe(state: State, x: Tensor, y: Tensor) -> Tensor:
    """The two best by sigmoid + bias; weights sum to 2. One shared expert."""
    out, score = _swiglu(_below(state, "shared_experts"), x), _apply(state, "gate", x).sigmoid()
    for b in range(x.shape[0]):
        for s in range(x.shape[1]):
            chosen = (score[b, s] + state["gate.e_score_correction_bias"]).argsort(descending=True)[:2].tolist()
            for e in chosen:
                gate = 2.0 * score[b, s, e] / score[b, s, chosen].sum()
                out[b, s] += gate * _swiglu(_below(state, f"experts.blocks.{e}"), x[b, s])
    return out


def diffmoe(by_batch: bool) -> FeedForward:
    """By thresholds on the predictor: which tokens, or, as in the original, how many of the batch's best."""

    def feed_forward(state: State, x: Tensor, y: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        out, score = torch.zeros_like(flat), (flat @ state["gate_weight"].T).softmax(-1)
        chance = _two_layers(state, flat, F.silu, ("capacity_predictor.0", "capacity_predictor.2")).sigmoid()
        for e in range(EXPERTS):
            over = (chance[:, e] > state["expert_threshold"][e]).nonzero().flatten()
            best = score[:, e].argsort(descending=True)[: len(over)]
            for n in (best if by_batch else over).tolist():
                out[n] += score[n, e] * _two_layers(_expert(state, e), flat[n])
        return out.view_as(x)

    return feed_forward


def _experts(shapes: Callable[[str], dict[str, tuple[int, ...]]], name: str = "experts") -> dict[str, tuple[int, ...]]:
    return {key: shape for e in range(EXPERTS) for key, shape in shapes(f"{name}.{e}").items()}


_FULL = _experts(lambda name: _mlp(name, 4 * WIDTH))
_GATE = {"gate_weight": (EXPERTS, WIDTH)}
_PREDICTOR = _linear("capacity_predictor.0", WIDTH, WIDTH) | _linear("capacity_predictor.2", EXPERTS, WIDTH)
_THRESHOLD: dict[str, tuple[int, ...]] = {"expert_threshold": (EXPERTS,), "ema_decay": (1,)}


def _half(name: str) -> dict[str, tuple[int, ...]]:
    return _mlp(name, 2 * WIDTH, "up_proj", "down_proj")


PEERS = {
    "DiT-MoE-XL": Peer(
        {"gate.weight": (EXPERTS, WIDTH)}
        | _experts(lambda name: _gated(name, 4 * WIDTH))
        | _gated("shared_experts", 2 * WIDTH),
        dit_moe,
        blocks=tuple(range(DEPTH)),
        place="moe",
        attention=("Wqkv", "out_proj"),
        qk_norm_eps=1e-6,
    ),
    "token choice": Peer({"gate.weight": (EXPERTS, WIDTH)} | _FULL, token_choice),
    "expert choice": Peer(_GATE | _FULL, expert_choice),
    "ProMoE": Peer(
        {"cluster_centers": (EXPERTS - 1, WIDTH)} | _experts(_half) | _half("shared_expert"), promoe, classes=1000
    ),
    "DSMoE": Peer(
        {"gate.weight": (EXPERTS, WIDTH), "gate.e_score_correction_bias": (EXPERTS,)}
        | _experts(lambda name: _gated(name, 2 * WIDTH), "experts.blocks")
        | _gated("shared_experts", 2 * WIDTH),
        dsmoe,
        act=F.silu,
        rotary=True,
    ),
    "DiffMoE": Peer(_GATE | _FULL | _PREDICTOR | _THRESHOLD, diffmoe(by_batch=False)),
}
DIFFMOE_BY_BATCH = PEERS["DiffMoE"]._replace(feed_forward=diffmoe(by_batch=True))
