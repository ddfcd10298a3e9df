"""What a merge did, measured on its factors module by module, against the exact weighted sum in the QR core of the skills."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skillbank.certificate import Certificate
from skillbank.core import Core, Factor, promote
from skillbank.merge.lift import Merged, Part, resolution
from skillbank.skill import cosines

__all__ = ["Measured"]


@dataclass
class Measured:
    """Certificate in the making.

    Args:
        count: K, all skills that the user gave.

    """

    count: int
    norms: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    effective: dict[str, float] = field(default_factory=dict)
    kept: float = 0.0
    whole: float = 0.0
    cuts: bool = False

    def __post_init__(self) -> None:
        """Start with nothing."""
        self.products = torch.zeros(self.count, self.count, dtype=torch.float64)

    def absent(self, module: str) -> None:
        """Only skills at weight 0 have the module."""
        self.norms[module] = (0.0, 0.0, 0.0)
        self.effective[module] = 0.0

    def cut(self, part: Part, merged: Merged, kept: float) -> None:
        """Some of a module's merge was kept, by its norm; of the sum itself the error tells that."""
        if merged.matrix is part.total:
            return
        self.cuts = True
        self.kept += kept**2
        self.whole += float(merged.matrix.norm() if merged.norm is None else merged.norm) ** 2

    def add(self, part: Part, pair: Factor) -> None:
        """A module of the merge."""
        flat = part.deltas.flatten(1)
        products = (flat @ flat.mT).cpu()
        places = torch.tensor(part.places)
        self.products[places[:, None], places] += products
        total = part.total
        a, b = (half.to(flat) for half in pair)
        rounding = resolution(promote(pair)) * math.sqrt(float(products.trace()))
        gram_a, gram_b, distance = _compared(part.core, total, a.flatten(1), b)
        self.norms[part.module] = distance, float(total.norm()), rounding
        self.ranks[part.module] = len(a)
        self.effective[part.module] = _effective_rank(gram_a, gram_b)

    def certificate(self, method: str) -> Certificate:
        """Return what all modules together say."""
        lost, whole, rounding = (math.hypot(*column) for column in zip(*self.norms.values(), strict=True))
        error, apart = _share(lost, whole, rounding), float(self.products.trace())
        gone = 1 - self.kept / self.whole if self.whole else 0.0
        return Certificate(
            method=method,
            exact=lost <= rounding,
            error=error,
            energy=max(0.0, 1 - error**2),
            errors={name: _share(*self.norms[name]) for name in sorted(self.norms)},
            ranks=dict(sorted(self.ranks.items())),
            conflict=cosines(self.products).tolist(),
            cut=(math.sqrt(gone) if gone > 1e-12 else 0.0) if self.cuts else None,
            effective_ranks=dict(sorted(self.effective.items())),
            cancelled=max(0.0, 1 - whole**2 / apart) if apart else 0.0,
        )


def _compared(bases: Core, total: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, float]:
    """`A A^T`, `B^T B` and `||Q_B C Q_A^T - B A||_F`, from what of B A lies within the bases and from what does not, which are orthogonal."""
    left, right = bases.left.mT @ b, a @ bases.right
    out_b, out_a = b - bases.left @ left, a - right @ bases.right.mT
    gram_left, gone_b, gone_a = left.mT @ left, out_b.mT @ out_b, out_a @ out_a.mT
    gram_a = right @ right.mT + gone_a
    outside = (gone_b * gram_a).sum() + (gram_left * gone_a).sum()
    return gram_a, gram_left + gone_b, float(((total - left @ right).square().sum() + outside.clamp_min(0)).sqrt())


def _effective_rank(gram_a: Tensor, gram_b: Tensor) -> float:
    """Exponential of the entropy of the singular values of B A (Roy and Vetterli, 2007); 0 for a delta that is zero."""
    values, vectors = torch.linalg.eigh(gram_b)
    half = vectors * values.clamp_min(0).sqrt()
    singular = torch.linalg.eigvalsh(half.mT @ gram_a @ half).clamp_min(0).sqrt()
    if not singular.sum():
        return 0.0
    shares = singular[singular > 0] / singular.sum()
    return float((-(shares * shares.log()).sum()).exp())


def _share(lost: float, whole: float, rounding: float) -> float:
    """Relative error; where the parts cancel up to rounding, what is lost in rounding is no error."""
    if whole > rounding:
        return lost / whole
    return 0.0 if lost <= rounding else math.inf
