"""Experts made of the hidden units of trained feed-forwards (sparse upcycling), dense ones or experts.

A feed-forward is a sum over its hidden units. Its `parts` equal shares of them, the pieces, are experts that together
are the feed-forward again; there are `copies` of each. Experts of one copy of a feed-forward have the same row in the
router, so that a token's best experts are such a copy, and the model starts where its source ended: virtual groups
(He et al. 2024, arXiv 2410.07524). Where a token has fewer experts than a feed-forward has pieces, the router's rows
predict instead which pieces give most of the output.
"""

# N tokens, D width, H hidden units, P matrices into them (1, or 2 for SwiGLU), E experts

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dit_moe.config import ConfigError
from dit_moe.models.base import TransformerConfig
from dit_moe.moe import Activation, Experts, MoELayer
from dit_moe.moe.activations import ACTIVATIONS
from dit_moe.moe.layer import FeedForward
from dit_moe.moe.routers import Router

Method = Literal["split", "copy", "cluster"]
LEADING = 3.0  # what tells copies apart in a router, in standard deviations of what tells their experts apart
ROUNDS = 3  # of k-means with equal sizes, after one without
RIDGE = 1e-2  # of the least squares, in mean squares of an input


# ---------------------------------------------------------------------------------------------------------- the shares


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Expert (copy · parents + parent) · parts + part is that part of that copy of that feed-forward of the source."""

    parents: int  # feed-forwards of the source that are used: 1 of a dense block
    parts: int
    copies: int
    shared: int = 0  # hidden units of a dense feed-forward that every token keeps, in the shared experts

    @property
    def experts(self) -> int:
        return self.copies * self.parents * self.parts

    def groups(self, target: float) -> bool:
        """Whether the experts of a token are whole feed-forwards."""
        return target % self.parts == 0


def layout_of(old: TransformerConfig, new: TransformerConfig, block: int) -> Layout:
    """How the experts of a block of `new` come from that block of `old`. ConfigError if they cannot, exactly."""
    assert new.moe is not None
    wanted, hidden, shared = new.moe.experts, new.expert_hidden, new.shared_width
    activation = old.moe.activation if old.moe is not None and old.has_experts(block) else old.activation
    if activation != new.moe.activation:
        problem = f"={new.moe.activation} is not that of the run's feed-forwards, {activation}"
        raise ConfigError("model.moe.activation", f"{problem}; drop the line")
    if not old.has_experts(block):
        parents, units = 1, old.need("mlp_hidden") - shared
    else:
        assert old.moe is not None
        parents, units = old.moe.experts, old.expert_hidden
        if shared != old.shared_width:
            problem = f"={new.moe.shared_experts} have {shared} hidden units, and those of the run {old.shared_width}"
            raise ConfigError("model.moe.shared_experts", f"{problem}; keep them as they are")
    if units <= 0 or units % hidden:
        has = "the feed-forward has" if parents == 1 else "each expert of the run has"
        problem = f"={hidden} does not divide the {units} hidden units that {has}"
        raise ConfigError("model.moe.expert_hidden", f"{problem}; choose a width that does")
    parts = units // hidden
    if wanted % parts:
        problem = f"={wanted} is no multiple of the {parts} experts that a feed-forward becomes at this width"
        raise ConfigError("model.moe.experts", f"{problem}; choose one, or another model.moe.expert_hidden")
    used, copies = min(parents, wanted // parts), max(1, wanted // parts // parents)
    if used * copies * parts != wanted:
        problem = f"={wanted} is no multiple of the {parents * parts} that the experts of the run become"
        raise ConfigError("model.moe.experts", f"{problem}; choose one, or fewer")
    return Layout(parents=used, parts=parts, copies=copies, shared=0 if old.has_experts(block) else shared)


def require_upcyclable(old: TransformerConfig, new: TransformerConfig) -> None:
    """ConfigError unless the weights of `old` can become those of `new`: all but its experts has the same shape."""
    if type(old) is not type(new):
        raise ConfigError("model.name", f"={new.name} is of another family than {old.name}; name one of that")
    for field in ("depth", "width", "heads", "mlp_hidden"):
        if getattr(old, field) != getattr(new, field):
            problem = f"={getattr(new, field)} differs from the run's {getattr(old, field)}"
            raise ConfigError(f"model.{field}", f"{problem}; only experts, classes and the input's size may change")
    for block in range(new.need("depth")):
        if new.has_experts(block):
            layout_of(old, new, block)
        elif old.has_experts(block):
            every = None if new.moe is None else new.moe.every
            problem = f"={every} leaves block {block} without experts, and it has some in the run"
            raise ConfigError("model.moe.every", f"{problem}; experts do not become a dense feed-forward")


# ----------------------------------------------------------------------------------------------------------- the units


@dataclass(frozen=True, kw_only=True)
class Units:
    """Hidden units: the sum over them of activation(in·x + bias)·out, and a bias of the sum."""

    activation: Activation
    in_PHD: Tensor
    out_HD: Tensor
    bias_PH: Tensor | None
    bias_D: Tensor | None

    @classmethod
    def of(cls, module: Any, activation: Activation, expert: int = 0) -> Units:
        """Those of a dense feed-forward, or of one of `Experts`."""
        if isinstance(module, Experts):
            w_in, w_out = module.w_in[expert].T, module.w_out[expert]
            biases = [None if each is None else each[expert] for each in (module.bias_in, module.bias_out)]
        else:
            first, last = (module.w_in, module.w_out) if isinstance(module, FeedForward) else (module.fc1, module.fc2)
            w_in, w_out, biases = first.weight, last.weight.T, [first.bias, last.bias]
        hidden = len(w_out)
        return cls(
            activation=activation,
            in_PHD=w_in.detach().unflatten(0, (-1, hidden)),
            out_HD=w_out.detach(),
            bias_PH=None if biases[0] is None else biases[0].detach().unflatten(0, (-1, hidden)),
            bias_D=None if biases[1] is None else biases[1].detach(),
        )

    def take(self, units: Tensor) -> Units:
        """Some of them, by number."""
        bias_PH = None if self.bias_PH is None else self.bias_PH[:, units]
        return replace(self, in_PHD=self.in_PHD[:, units], out_HD=self.out_HD[units], bias_PH=bias_PH)

    def active(self, x_ND: Tensor) -> Tensor:
        """What the units are at the given inputs, [N, H]."""
        hidden_NPH = torch.einsum("nd,phd->nph", x_ND, self.in_PHD)
        if self.bias_PH is not None:
            hidden_NPH = hidden_NPH + self.bias_PH
        return ACTIVATIONS[self.activation](hidden_NPH.flatten(1))

    def output(self, x_ND: Tensor) -> Tensor:
        """[N, D], without the bias of the sum."""
        return self.active(x_ND) @ self.out_HD


# --------------------------------------------------------------------------------------------------- the new weights


def upcycle_block(
    layer: MoELayer, source: MoELayer | nn.Module, layout: Layout, method: Method, inputs_ND: Tensor, usage_E: Tensor
) -> bool:
    """Give an MoE layer the hidden units of the feed-forward, or of the MoE layer, in its place in the source.

    Args:
        inputs_ND: tokens as they come there, on which units are clustered and routers fitted.
        usage_E: how much each expert of the source is used: the least used ones are left out.

    Returns whether the router went on as it was, its threshold included; else the caller sets that.
    """
    activation, rows_KD = layer.experts.activation, None
    if isinstance(source, MoELayer):
        kept = usage_E.argsort(descending=True)[: layout.parents].sort().values
        parents = [Units.of(source.experts, activation, int(expert)) for expert in kept]
        if layer.shared is not None and source.shared is not None:
            layer.shared.load_state_dict(source.shared.state_dict())
        rows_KD = _rows_of(source.router, layer.router, kept)
    else:
        parents = [Units.of(source, activation)]
    pieces = []
    for units in parents:
        shares = _shares(units, layout, method, inputs_ND)
        if layout.shared:
            assert layer.shared is not None
            _write_shared(layer.shared, units.take(shares.pop(0)))
            units = replace(units, bias_D=None)  # which every token has from there
        if units.bias_D is not None:
            units = replace(units, bias_D=units.bias_D / layout.parts)
        pieces.append([units.take(share) for share in shares])
    for copy in range(layout.copies):
        for parent, of_parent in enumerate(pieces):
            for part, piece in enumerate(of_parent):
                _write_expert(layer.experts, (copy * layout.parents + parent) * layout.parts + part, piece)
    scale_experts(layer, min(layout.parts, max(1, layer.router.target)))  # since the gates of a token sum to 1
    if isinstance(source, MoELayer) and _keep_router(source.router, layer.router, same_experts=layout.parts == 1):
        return True
    _set_router(layer.router, layout, rows_KD, pieces, inputs_ND)
    return False


def scale_experts(layer: MoELayer, factor: float) -> None:
    """Multiply what the routed experts give, as where the gates of a token do not sum to 1."""
    with torch.no_grad():
        layer.experts.w_out.mul_(factor)
        if layer.experts.bias_out is not None:
            layer.experts.bias_out.mul_(factor)


def add_noise(experts: Experts, share: float) -> None:
    """Add normal noise to the experts' matrices, of so many times the standard deviation of their elements."""
    with torch.no_grad():
        for matrices in (experts.w_in, experts.w_out):
            matrices.add_(torch.randn_like(matrices), alpha=share * matrices.std().item())


def _shares(units: Units, layout: Layout, method: Method, inputs_ND: Tensor) -> list[Tensor]:
    """The numbers of the units of each piece; before them those of the shared experts, if they get any."""
    numbers, shared = torch.arange(len(units.out_HD)), layout.shared
    if method != "cluster":
        return [*([numbers[:shared]] if shared else []), *numbers[shared:].chunk(layout.parts)]
    active_NH = units.active(inputs_ND)
    ranked = active_NH.abs().mean(0).argsort(descending=True)  # what fires for all tokens is what they share
    rest = ranked[shared:].sort().values
    clusters = [rest[cluster] for cluster in equal_clusters(active_NH[:, rest].T, layout.parts)]
    return [*([ranked[:shared]] if shared else []), *clusters]


def equal_clusters(active_HN: Tensor, count: int) -> list[Tensor]:
    """Numbers of the units, [H / count] each, that fire together: k-means in which all clusters have one size.

    Units are compared by the direction of their activations over N tokens (MoEfication, Zhang et al. 2022).
    """
    from scipy.optimize import linear_sum_assignment  # here, as both imports take long
    from sklearn.cluster import KMeans

    points_HN = nn.functional.normalize(active_HN, dim=-1).numpy()
    means_CN = KMeans(count, n_init=1, random_state=0).fit(points_HN).cluster_centers_
    size = len(points_HN) // count
    for _ in range(ROUNDS):
        cost_HC = -2 * points_HN @ means_CN.T + (means_CN**2).sum(-1)
        _, seat_H = linear_sum_assignment(np.repeat(cost_HC, size, axis=1))
        members = [np.flatnonzero(seat_H // size == cluster) for cluster in range(count)]
        means_CN = np.stack([points_HN[each].mean(0) for each in members])
    return [torch.from_numpy(each) for each in members]


@torch.no_grad()
def _write_expert(experts: Experts, number: int, units: Units) -> None:
    experts.w_in[number] = units.in_PHD.flatten(0, 1).T
    experts.w_out[number] = units.out_HD
    if experts.bias_in is not None and units.bias_PH is not None:
        experts.bias_in[number] = units.bias_PH.flatten()
    if experts.bias_out is not None and units.bias_D is not None:
        experts.bias_out[number] = units.bias_D


@torch.no_grad()
def _write_shared(shared: FeedForward, units: Units) -> None:
    shared.w_in.weight.copy_(units.in_PHD.flatten(0, 1))
    shared.w_out.weight.copy_(units.out_HD.T)
    if units.bias_PH is not None:
        shared.w_in.bias.copy_(units.bias_PH.flatten())
    if units.bias_D is not None:
        shared.w_out.bias.copy_(units.bias_D)


# --------------------------------------------------------------------------------------------------------- the router


def _rows_of(old: Router, new: Router, kept: Tensor) -> Tensor | None:
    """The rows of the experts that are kept, if the router of the source has them, and the new one can."""
    if old.weight is None or new.weight is None or old.weight.shape[1] != new.weight.shape[1]:
        return None
    return old.weight.detach()[kept] if len(old.weight) >= old.experts else None


def _keep_router(old: Router, new: Router, same_experts: bool) -> bool:
    """Take what fits of the router of the source, beside its rows; returns whether that is all of it.

    `same_experts`: of as many, each is the one of the same number in the source, and no part of another.
    """
    if same_experts and old.config == new.config and (old.experts, old.target) == (new.experts, new.target):
        new.load_state_dict(old.state_dict())
        return True
    own = dict(new.named_parameters())
    for name, parameter in old.named_parameters():
        if name != "weight" and name in own and own[name].shape == parameter.shape:
            own[name].data.copy_(parameter.detach())
    return False


@torch.no_grad()
def _set_router(
    router: Router, layout: Layout, rows_KD: Tensor | None, pieces: Sequence[Sequence[Units]], inputs_ND: Tensor
) -> None:
    """The row of an expert is its parent's, plus what tells the copies apart, plus what tells the parts apart.

    Where every token has whole feed-forwards, the parts have nothing of their own. Otherwise each has a linear
    prediction, from the token, of its share in the output of its parent.
    """
    if router.weight is None:
        return
    weight, copies, parents = router.weight, layout.copies, layout.parents
    fresh = weight.clone()
    if rows_KD is None:
        several = copies * parents > 1
        rows = fresh[: copies * parents] if several else torch.zeros_like(fresh[:1])
    else:
        rows = rows_KD.repeat(copies, 1)
        if copies > 1:
            leading = LEADING * rows_KD.std() / fresh.std().clamp(min=1e-12)
            rows = rows + leading * fresh[:copies].repeat_interleave(parents, dim=0)
    rows = rows.repeat_interleave(layout.parts, dim=0)
    if not layout.groups(router.target):
        own = fresh[: layout.parents * layout.parts]
        if router.config.input == "token":
            fitted = torch.cat([_rows_of_parts(parts, inputs_ND) for parts in pieces])
            spread = (inputs_ND @ own.T).std() / (inputs_ND @ fitted.T).std().clamp(min=1e-12)
            own = fitted * spread
        rows = rows + own.repeat(copies, 1)
    weight[: len(rows)] = rows[: len(weight)]
    if router.theta is not None and rows_KD is not None and copies > 1:
        router.theta.mul_(rows.std() / rows_KD.std())


def _rows_of_parts(parts: Sequence[Units], inputs_ND: Tensor) -> Tensor:
    """[parts, D]: by least squares, the share of each part in the output of all, against the mean of the parts."""
    outputs = torch.stack([units.output(inputs_ND) for units in parts])
    whole_ND = outputs.sum(0)
    share_NP = torch.einsum("pnd,nd->np", outputs, whole_ND) / whole_ND.square().sum(-1, keepdim=True).clamp(min=1e-12)
    share_NP = share_NP - share_NP.mean(-1, keepdim=True)
    square_DD = inputs_ND.T @ inputs_ND
    square_DD.diagonal().add_(RIDGE * square_DD.diagonal().mean())
    return torch.linalg.solve(square_DD, inputs_ND.T @ share_NP).T
