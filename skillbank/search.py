"""Skills that do the same, or nearly: compared as deltas, in factored form, whatever their factors look like."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from skillbank.bank import Bank, Ref
from skillbank.skill import Skill, core, gram

__all__ = ["Neighbour", "duplicates", "overlap", "similar"]


@dataclass(frozen=True)
class Neighbour:
    """A skill beside another.

    Args:
        ref: exact reference.
        cosine: of the two deltas over all modules, in [-1, 1].
        size: norm of its delta over the other's.
        columns: how far both write into the same directions of the outputs, in [0, 1], see `overlap`.
        rows: how far both read the same directions of the inputs, likewise.

    """

    ref: Ref
    cosine: float
    size: float
    columns: float
    rows: float


def similar(bank: Bank, ref: str | Ref, *, top: int = 10) -> list[Neighbour]:
    """Skills of the same base that are nearest to one by cosine of deltas, nearest first.

    Args:
        bank: where they are.
        ref: a skill.
        top: at most this many.

    Raises:
        UnknownRef: no such version.
        ValueError: it is no skill.

    """
    exact = bank.resolve(ref)
    card, skill = bank.card(exact), bank.get(exact)
    if not isinstance(skill, Skill):
        raise ValueError(f"{str(exact)!r} is a {card.kind}: only skills are compared")
    found = []
    for other, its in _skills(bank, card.base_name):
        if other != exact:
            products = gram([skill, its])
            mine, theirs = math.sqrt(products[0, 0]), math.sqrt(products[1, 1])
            cosine, size = float(products[0, 1]) / (mine * theirs) if mine and theirs else 0.0, theirs / mine if mine else math.inf
            found.append(Neighbour(other, cosine, size, *overlap(skill, its)))
    return sorted(found, key=lambda each: -each.cosine)[:top]


def overlap(one: Skill, two: Skill) -> tuple[float, float]:
    """How much the column spaces, and the row spaces, of the deltas of two skills have in common, from the factors alone.

    Per module it is the mean of cos^2 over the min(R_1, R_2) principal angles between the two spaces, where R is the rank of a delta: 1 where one
    space lies in the other, 0 where they are orthogonal (the subspace similarity of LoRA, arXiv 2106.09685, equation 4). Over the modules it is
    the mean weighted by the energy ||delta||_F^2 of the first skill; a module that only one of them has counts 0.

    Args:
        one: a skill.
        two: another on the same base.

    Returns:
        For the columns (outputs) and for the rows (inputs), each in [0, 1]; 0 where a skill is zero.

    """
    total, shared = 0.0, torch.zeros(2, dtype=torch.float64)
    for name in one:
        first, second = core([one, two], name).cores
        energy = float(first.square().sum())
        total += energy
        (left, right), (other_left, other_right) = _spaces(first), _spaces(second)
        if rank := min(left.shape[1], other_left.shape[1]):
            common = torch.stack([(left.mT @ other_left).square().sum(), (right.mT @ other_right).square().sum()]) / rank
            shared += energy * common.cpu()
    columns, rows = (shared / total).clamp(0, 1).tolist() if total else (0.0, 0.0)
    return columns, rows


def _spaces(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the column and the row space; singular values below a millionth of the largest are none."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > 1e-6 * s[0]
    return u[:, kept], vh.mT[:, kept]


def duplicates(bank: Bank, *, tolerance: float = 1e-5) -> list[list[Ref]]:
    """Groups of skills that compute the same on the same base, such as one function stored in two gauges.

    Args:
        bank: where they are.
        tolerance: largest norm of the difference of two deltas over the norm of one.

    """
    groups: list[list[Ref]] = []
    for base in sorted({entry.card.base_name for entry in bank.list("skill")}):
        sized = sorted(((math.sqrt(gram([skill])[0, 0]), ref) for ref, skill in _skills(bank, base)), key=lambda each: (each[0], str(each[1])))
        here: list[list[tuple[float, Ref]]] = []
        for norm, ref in sized:  # the same function has the same norm, and others may have it too
            near = (group for group in here if group[-1][0] >= (1 - tolerance) * norm)
            same = next((group for group in near if _apart(bank, group[-1][1], ref, norm) <= tolerance), None)
            if same is None:
                here.append(same := [])
            same.append((norm, ref))
        groups += [[ref for _, ref in group] for group in here]
    return [sorted(group, key=str) for group in groups if len(group) > 1]


def _apart(bank: Bank, one: Ref, two: Ref, norm: float) -> float:
    products = gram([skill for skill in map(bank.get, (one, two)) if isinstance(skill, Skill)])
    difference = max(float(products[0, 0] + products[1, 1] - 2 * products[0, 1]), 0.0)
    return math.sqrt(difference) / norm if norm else 0.0


def _skills(bank: Bank, base: str) -> Iterator[tuple[Ref, Skill]]:
    """Skills of a base, one in memory at a time."""
    for entry in bank.list("skill"):
        if entry.card.base_name == base:
            skill = bank.get(entry.ref)
            assert isinstance(skill, Skill)
            yield entry.ref, skill
