"""Which tensors of another suite make up which of ours, both ways, without reading their numbers to check that."""

# E experts

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_moe.formatting import first_few

LISTED = 10  # tensors in a message
NEAR = 1e-5  # of a table that two programs compute: in another order it is rounded otherwise
Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Rule:
    """Some of our tensors, and those of theirs that they are made of.

    In names, ``#`` is the number of a block and, in theirs, ``*`` that of an expert: such a rule takes the tensors of
    all experts, expert by expert. A ``#`` in theirs alone means copies in every block.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    read: Callable[[Tensors], Tensors]  # theirs → ours
    write: Callable[[Tensors], Tensors]  # ours → theirs


def same(ours: str, theirs: str | None = None) -> Rule:
    """The tensor itself, by another name if it has one."""
    return Rule((ours,), (theirs or ours,), list, list)


def transposed(ours: str, theirs: str) -> Rule:
    """A matrix in the other layout."""
    return Rule((ours,), (theirs,), _transpose, _transpose)


def joined(ours: str, *theirs: str) -> Rule:
    """Parts of equal size, one behind the other along the first dimension."""
    return Rule((ours,), theirs, lambda parts: [torch.cat(list(parts))], lambda whole: whole[0].chunk(len(theirs)))


def split(theirs: str, *ours: str) -> Rule:
    """The other way round: one tensor of theirs is several of ours."""
    return Rule(ours, (theirs,), lambda whole: whole[0].chunk(len(ours)), lambda parts: [torch.cat(list(parts))])


def copies(ours: str, theirs: str) -> Rule:
    """One tensor of which they have a copy in every block. ValueError if these differ."""

    def one(found: Tensors) -> Tensors:
        if not found[0].is_meta and not all(torch.equal(found[0], each) for each in found[1:]):
            raise ValueError(f"{theirs} differs between blocks, which should hold copies of one tensor")
        return found[:1]

    return Rule((ours,), (theirs,), one, list)


def experts(ours: str, *theirs: str) -> Rule:
    """Matrices [out, in] of every expert → one [E, in, out], or biases [out] → [E, out]; several of theirs are joined
    along `out`."""

    def read(found: Tensors) -> Tensors:
        each = [torch.cat(list(found[start : start + len(theirs)])) for start in range(0, len(found), len(theirs))]
        return [torch.stack([_laid_out(tensor) for tensor in each])]

    def write(stacked: Tensors) -> Tensors:
        return [part.contiguous() for tensor in stacked[0] for part in _laid_out(tensor).chunk(len(theirs))]

    return Rule((ours,), theirs, read, write)


def beside_constant(ours: str, theirs: str, constant: str, value: float, numbers: int | None = None) -> Rule:
    """The tensor `theirs` itself, beside which they keep `constant`, whose numbers are all `value`.

    There are `numbers` of them, or as many as rows of ours. ValueError if any is another.
    """

    def read(found: Tensors) -> Tensors:
        tensor, fixed = found
        if not fixed.is_meta and not bool((fixed == value).all()):
            raise ValueError(f"{constant} holds other numbers than {value:g}, which no option of ours stands for")
        return [tensor]

    return Rule((ours,), (theirs, constant), read, lambda own: [own[0], torch.full((numbers or len(own[0]),), value)])


def constant(ours: str, value: Callable[[], Tensor]) -> Rule:
    """A tensor that only we have, on which no output depends."""
    return Rule((ours,), (), lambda _: [value()], lambda _: [])


def computed(ours: str, value: Callable[[], Tensor]) -> Rule:
    """A tensor that they do not keep but compute, as `value` does. Written, ours must be that: else it would be lost,
    and ValueError says so."""

    def write(own: Tensors) -> Tensors:
        difference = (own[0].float() - value()).abs().max().item()
        if not difference <= max(NEAR, torch.finfo(own[0].dtype).eps):
            raise ValueError(f"{ours} differs by {difference:.2g} from the one that is computed there")
        return []

    return Rule((ours,), (), lambda _: [value()], write)


def _laid_out(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.ndim == 2 else tensor


def _transpose(found: Tensors) -> Tensors:
    return [found[0].mT.contiguous()]


# ------------------------------------------------------------------------------------------------------ both directions


def to_ours(
    rules: Sequence[Rule], own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], ignored: Mapping[str, str]
) -> dict[str, Tensor]:
    """Their tensors under our names.

    Args:
        own: our tensors, of which only names, shapes and dtypes matter.
        ignored: patterns of their names that are left out, with the reasons.

    Raises ValueError listing their tensors that are missing, left over, or of another shape or kind.
    """
    made: dict[str, Tensor] = {}
    used: set[str] = set()
    missing: list[str] = []
    misshapen: list[str] = []
    otherwise: list[str] = []  # whole numbers stand for others, as quantised ones do, or were never trained
    for rule, our_names, their_names in _expanded(rules, own):
        used |= set(their_names)
        absent = [name for name in their_names if name not in theirs]
        missing += absent
        if absent:
            continue
        try:
            tensors = rule.read([theirs[name] for name in their_names])
        except RuntimeError:  # matrices that do not go together
            misshapen.append(f"{their_names[0]} {list(theirs[their_names[0]].shape)}")
            continue
        for name, tensor in zip(our_names, tensors, strict=True):
            shown = their_names[0] if their_names else name
            if tensor.shape != own[name].shape:
                misshapen.append(f"{shown} {list(tensor.shape)} for {list(own[name].shape)}")
            elif tensor.is_floating_point() != own[name].is_floating_point():
                otherwise.append(f"{shown} {tensor.dtype} for {own[name].dtype}".replace("torch.", ""))
            made[name] = tensor
    extra = [name for name in theirs if name not in used and not any(_matches(each, name) for each in ignored)]
    problems = {"missing": missing, "unexpected": extra, "of another shape": misshapen, "of another kind": otherwise}
    found = [f"{len(names)} {problem}: {first_few(names, LISTED)}" for problem, names in problems.items() if names]
    if found:
        raise ValueError(f"its tensors do not fit: {'; '.join(found)}")
    return made


def to_theirs(rules: Sequence[Rule], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: our tensors under their names. Tensors that only they have are not made."""
    made: dict[str, Tensor] = {}
    for rule, our_names, their_names in _expanded(rules, ours):
        tensors = list(rule.write([ours[name] for name in our_names]))
        made |= zip(their_names, tensors * len(their_names) if len(tensors) == 1 else tensors, strict=True)
    return made


def _expanded(rules: Sequence[Rule], own: Mapping[str, Tensor]) -> Iterator[tuple[Rule, list[str], list[str]]]:
    """Every rule for every block that it applies to: with our names and theirs in full.

    `own` says which blocks there are and, by the first dimension of what an expert's tensors make up, how many experts.
    ValueError in the end if some of ours are in no rule.
    """
    covered: set[str] = set()
    blocks = 1 + max((int(match[1]) for name in own if (match := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    for rule in rules:
        for block in range(blocks) if "#" in rule.ours[0] else (None,):
            our_names = [_filled(name, "#", block) for name in rule.ours]
            if our_names[0] not in own:
                continue
            covered |= set(our_names)
            their_names = [_filled(name, "#", block) for name in rule.theirs]
            if any("#" in name for name in their_names):
                their_names = [_filled(name, "#", number) for name in their_names for number in range(blocks)]
            if any("*" in name for name in their_names):
                count = len(own[our_names[0]])
                their_names = [_filled(name, "*", expert) for expert in range(count) for name in their_names]
            yield rule, our_names, their_names
    if left := sorted(set(own) - covered):
        raise ValueError(f"it has no tensors for {first_few(left, LISTED)}")


def _filled(name: str, mark: str, number: int | None) -> str:
    return name if number is None else name.replace(mark, str(number))


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\#", r"\d+"), name) is not None
