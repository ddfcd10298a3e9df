"""A skill in memory and its exact low-rank algebra.

A skill is one pair of factors (A, B) per adapted module with `delta = B @ A`, the scale already folded in. Every operation below works on the
factors: a weighted sum stacks them on the rank axis, and everything spectral happens in the R x R core between two QR factorisations, so that
nothing of size O x I is ever formed.

Shapes: K skills, R rank (sum over the skills), O out, I in. A is (R, I) for linear and embedding layers, (R, I, *kernel) for convolutions;
B is (O, R).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from skillbank.certificate import Certificate
from skillbank.core import Core, Factor, check_cut, core_of, cut, promote, side_by_side

__all__ = ["Deltas", "Factor", "Lazy", "Skill", "core", "cosine", "cosines", "digest", "distance", "gram", "modules_of", "stack", "truncate"]

_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes in the order of the names: the same tensors give the same hex string on any machine."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{tuple(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


class Deltas(Protocol):
    """What can be added to a net's weights: a `Skill`, or a merge that has no low rank."""

    @property
    def embeddings(self) -> frozenset[str]:
        """Modules that are `nn.Embedding` layers."""

    def __iter__(self) -> Iterator[str]:
        """Module paths."""

    def __contains__(self, module: object) -> bool:
        """Whether `module` changes."""

    def size(self, module: str) -> tuple[int, tuple[int, ...]]:
        """(O, (I, *kernel)) of the layer."""

    def delta(self, module: str, least: torch.dtype | None = None) -> Tensor:
        """Dense change of the weight, (O, I, *kernel)."""


class Lazy(Mapping[str, Factor]):
    """Factors that are made when they are looked at, every time, and kept by nobody.

    Args:
        modules: their paths.
        make: from a module's path to its factors.

    """

    def __init__(self, modules: Iterable[str], make: Callable[[str], Factor]) -> None:
        self._modules = dict.fromkeys(sorted(modules))
        self._make = make

    def __getitem__(self, module: str) -> Factor:
        """(A, B) of one module."""
        if module not in self._modules:
            raise KeyError(module)
        a, b = self._make(module)
        return a.detach(), b.detach()

    def __contains__(self, module: object) -> bool:
        """Whether there is such a module; nothing is made."""
        return module in self._modules

    def __iter__(self) -> Iterator[str]:
        """Module paths in sorted order."""
        return iter(self._modules)

    def __len__(self) -> int:
        """Return the number of modules."""
        return len(self._modules)


@dataclass(frozen=True, eq=False)
class Skill:
    """A LoRA adapter as frozen factors: `{module path: (A, B)}`, `delta = B @ A`.

    Args:
        factors: A (R, I, *kernel) and B (O, R) per module, floating point, any rank per module. Tensors are detached, not copied;
            `Lazy` ones stay lazy.
        embeddings: the modules that are `nn.Embedding` layers; their I is the number of embeddings and their O the width. Only the on-disk
            format needs to know.
        certificate: what the merge that made this skill did; None for a trained skill.
        finite: all entries are known to be finite, so that they are not looked at.

    Raises:
        ValueError: no modules, shapes that do not multiply, a dtype that is not 16, 32 or 64 bits of floating point, or an entry that is not finite.

    """

    factors: Mapping[str, Factor]
    embeddings: frozenset[str] = field(default=frozenset())
    certificate: Certificate | None = None
    finite: InitVar[bool] = field(default=False, kw_only=True)

    def __post_init__(self, finite: bool) -> None:
        if not self.factors:
            raise ValueError("a skill needs at least one module, got none")
        for name, (a, b) in self.factors.items():
            if a.dim() < 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                raise ValueError(f"factor {name!r}: A must be (R, I) and B (O, R), got A {tuple(a.shape)} and B {tuple(b.shape)}")
            if not a.numel() or not b.numel():
                raise ValueError(f"factor {name!r} is empty, A is {tuple(a.shape)} and B {tuple(b.shape)}: leave the module out")
            if not {a.dtype, b.dtype} <= _DTYPES:
                raise ValueError(f"factor {name!r} must be 16, 32 or 64 bits of floating point, got A {a.dtype} and B {b.dtype}")
            if not (finite or (_finite(a) and _finite(b))):
                raise ValueError(f"factor {name!r} holds NaN or infinite entries: the adapter is damaged or its training diverged")
        unknown = self.embeddings - set(self.factors)
        if unknown:
            raise ValueError(f"embeddings name modules that the skill does not have: {sorted(unknown)}")
        if not isinstance(self.factors, Lazy):
            frozen = {name: (a.detach(), b.detach()) for name, (a, b) in sorted(self.factors.items())}
            object.__setattr__(self, "factors", MappingProxyType(frozen))

    def __iter__(self) -> Iterator[str]:
        """Module paths in sorted order."""
        return iter(self.factors)

    def __len__(self) -> int:
        """Return the number of adapted modules."""
        return len(self.factors)

    def __contains__(self, module: object) -> bool:
        """Whether `module` is adapted."""
        return module in self.factors

    def __getitem__(self, module: str) -> Factor:
        """(A, B) of one module."""
        try:
            return self.factors[module]
        except KeyError:
            raise KeyError(f"the skill has no module {module!r}; it has {list(self.factors)}") from None

    def __repr__(self) -> str:
        """One line: modules, ranks, parameters."""
        ranks = sorted(set(self.ranks.values()))
        return f"Skill({len(self)} modules, rank {'-'.join(map(str, {ranks[0]: 0, ranks[-1]: 0}))}, {self.num_parameters:,} parameters)"

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every module."""
        return {name: a.shape[0] for name, (a, _) in self.factors.items()}

    @property
    def num_parameters(self) -> int:
        """Number of stored values."""
        return sum(a.numel() + b.numel() for a, b in self.factors.values())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the stored factors (not of the function: another gauge of the same deltas has another fingerprint)."""
        return digest(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """Flat `{module.A, module.B}` view of the factors."""
        return {f"{name}.{letter}": tensor for name, pair in self.factors.items() for letter, tensor in zip("AB", pair, strict=True)}

    def size(self, module: str) -> tuple[int, tuple[int, ...]]:
        """(O, (I, *kernel)) of the layer."""
        a, b = self[module]
        return b.shape[0], tuple(a.shape[1:])

    def delta(self, module: str, least: torch.dtype | None = None) -> Tensor:
        """Dense change of the weight, (O, I, *kernel), in a dtype that holds the factors and `least`: never on a hot path."""
        a, b = self[module]
        dtype = promote([a, b])
        dtype = dtype if least is None else torch.promote_types(dtype, least)
        a, b = a.to(dtype), b.to(dtype)
        return (b @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Skill:
        """Return the same skill on another device or in another dtype."""
        return Skill({name: (a.to(device, dtype), b.to(device, dtype)) for name, (a, b) in self.factors.items()}, self.embeddings)

    def scaled(self, weight: float | Mapping[str, float]) -> Skill:
        """Multiply every delta by `weight`, or by a weight per module (modules that the mapping leaves out keep theirs)."""
        at = weight if isinstance(weight, Mapping) else dict.fromkeys(self.factors, weight)
        unknown = set(at) - set(self.factors)
        if unknown:
            raise ValueError(f"weights name modules that the skill does not have: {sorted(unknown)}")
        return Skill({name: (a, b * at.get(name, 1.0)) for name, (a, b) in self.factors.items()}, self.embeddings)

    def part(self, modules: Iterable[str]) -> Skill:
        """Only these modules; a ValueError where the skill has none of them."""
        chosen = {name: self[name] for name in modules}
        return Skill(chosen, self.embeddings & set(chosen))

    def norm(self) -> float:
        """Frobenius norm of all deltas together."""
        return float(gram([self])[0, 0].clamp_min(0).sqrt())


def core(skills: Sequence[Skill], module: str, dtype: torch.dtype = torch.float64) -> Core:
    """QR core of one module over K skills, see `core_of`; a skill without the module has a zero core."""
    return core_of(module, [skill.factors.get(module) for skill in skills], dtype)


def modules_of(skills: Iterable[Skill]) -> list[str]:
    """Sorted union of the modules of all skills."""
    return sorted({name for skill in skills for name in skill})


def stack(skills: Sequence[Skill], weights: Sequence[float] | Tensor | None = None) -> Skill:
    """Exact weighted sum `sum_k weights_k delta_k`: the factors of all skills side by side on the rank axis.

    Ranks, dtypes (promoted) and sets of modules may differ. A module's channels stand in the order of the skills.

    Args:
        skills: K skills, K >= 1.
        weights: (K,), any sign; None means 1 each, so that a gate can weight the channels later.

    Raises:
        ValueError: no skills, another number of weights than skills, or modules whose layers differ in size.

    """
    if not skills:
        raise ValueError("stack needs at least one skill, got none")
    values = [1.0] * len(skills) if weights is None else [float(w) for w in weights]
    if len(values) != len(skills):
        raise ValueError(f"got {len(values)} weights for {len(skills)} skills: give one weight per skill")
    factors: dict[str, Factor] = {}
    for name in modules_of(skills):
        there = [k for k, skill in enumerate(skills) if name in skill]
        factors[name] = side_by_side(name, [skills[k][name] for k in there], [values[k] for k in there])
    return Skill(factors, frozenset().union(*(skill.embeddings for skill in skills)))


def truncate(skill: Skill, *, rank: int | None = None, error: float | None = None, budget: int | None = None) -> Skill:
    """Optimal low-rank form of a skill (Eckart-Young, in the QR core), in balanced factors.

    Args:
        skill: what to shorten.
        rank: keep at most this many singular values per module.
        error: keep the fewest singular values over all modules together with `||delta - kept||_F <= error * ||delta||_F` in total, so that
            rank goes where the energy is; at least one per module. In [0, 1).
        budget: keep this many singular values over all modules together, the largest; at least one per module.

    Raises:
        ValueError: not exactly one of rank, error and budget, or values out of range.

    """
    if (rank, error, budget).count(None) != 2:
        raise ValueError(f"give either a rank, an error or a budget, got rank={rank}, error={error} and budget={budget}")
    check_cut(rank, error, budget, len(skill))
    parts = {name: (each, each.cores[0], promote(skill[name])) for name in skill for each in [core([skill], name)]}
    return Skill(cut(parts, rank=rank, error=error, budget=budget)[0], skill.embeddings)


def gram(skills: Sequence[Skill]) -> Tensor:
    """Inner products of the deltas over all modules, (K, K) float64: `G_ij = sum_modules tr(delta_i^T delta_j)`, from the factors alone."""
    total = torch.zeros(len(skills), len(skills), dtype=torch.float64)
    for name in modules_of(skills):
        cores = core(skills, name).cores.flatten(1)
        total += (cores @ cores.mT).cpu()
    return total


def cosine(skills: Sequence[Skill]) -> Tensor:
    """Cosine similarity of the deltas, (K, K) float64 in [-1, 1]; a skill that is zero has cosine 0 with all others."""
    return cosines(gram(skills))


def cosines(products: Tensor) -> Tensor:
    """Cosines from inner products, (K, K); 0 for what is zero."""
    norms = products.diagonal().clamp_min(0).sqrt()
    scale = torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(torch.float64).tiny), torch.zeros_like(norms))
    return (products * scale[:, None] * scale[None, :]).clamp(-1, 1)


def distance(one: Skill, two: Skill) -> dict[str, float]:
    """`||delta_two - delta_one||_F / ||delta_one||_F` per module, from the factors alone; infinite where `one` is zero and `two` is not.

    Raises:
        ValueError: modules whose layers differ in size.

    """
    found: dict[str, float] = {}
    for name in modules_of([one, two]):
        if name in one and name in two and all(torch.equal(mine, its) for mine, its in zip(one[name], two[name], strict=True)):
            found[name] = 0.0
            continue
        first, second = core([one, two], name).cores
        lost, whole = float((second - first).norm()), float(first.norm())
        found[name] = lost / whole if whole else math.inf if lost else 0.0
    return found


def _finite(tensor: Tensor) -> bool:
    """Whether every entry is finite; a sum is, at the speed of memory, if they all are and it does not overflow."""
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())
