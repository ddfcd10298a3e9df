"""Second oracles: other libraries' own implementations on the dense deltas, where they are right. Skipped where they are not installed.

pip install --no-deps mergekit==0.1.5
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skillbank import Skill, merge
from tests.tiny import close

pytestmark = pytest.mark.peers
mergekit = pytest.importorskip("mergekit.merge_methods", reason="mergekit is not installed")
seeds = st.integers(0, 10**6)


def skills(seed, count=3, out=12, inner=9):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rank, torch.randn(out, rank, generator=generator, dtype=torch.float64)) for rank in (2, 3, 4)[:count]]
    return [Skill({"a": (torch.randn(rank, inner, generator=generator, dtype=torch.float64), b)}) for rank, b in shapes]


def group(parts, base=True):
    """Base of zeros, so that what mergekit calls models are the deltas."""
    from mergekit.merge_methods.base import TensorGroup

    deltas = [part.delta("a") for part in parts]
    return TensorGroup.from_tensors([torch.zeros_like(deltas[0]), *deltas], base_index=0) if base else TensorGroup.from_tensors(deltas)


def task_arithmetic(parts, weights, **options):
    """mergekit's family of sparsify, elect and add."""
    from mergekit.merge_methods.base import PerNonBase
    from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge

    consensus, sparsify, more = options.pop("consensus"), options.pop("sparsify"), options
    merge_method = GeneralizedTaskArithmeticMerge(
        consensus_method=consensus, sparsification_method=sparsify, default_normalize=False, default_rescale=False,
        method_name="x", method_pretty_name="x", method_reference_url="x",
    )  # fmt: skip
    ids = range(1, len(parts) + 1)
    values = {key: PerNonBase(dict.fromkeys(ids, value)) for key, value in more.items()}
    weight = PerNonBase(dict(zip(ids, weights, strict=True)))
    return merge_method.merge_group(
        group(parts), weight=weight, normalize=consensus is not None, rescale=False, int8_mask=False, **{"lambda": 1.0}, **values
    )


@given(seeds, st.floats(0.05, 0.95))
@settings(max_examples=20, deadline=None)
def test_slerp(seed, t):
    from mergekit.merge_methods.slerp import slerp

    parts = skills(seed, 2)
    a, b = (part.delta("a").flatten()[None] for part in parts)
    close(merge(parts, [1 - t, t], method="slerp").delta("a").flatten(), slerp(torch.tensor([t], dtype=torch.float64), a, b)[0], 1e-9)


@given(seeds, st.floats(0.05, 0.95))
@settings(max_examples=20, deadline=None)
def test_nuslerp_row_by_row(seed, t):
    from mergekit.merge_methods.nuslerp import nuslerp

    parts = skills(seed, 2)
    close(merge(parts, [1 - t, t], method="nuslerp").delta("a"), nuslerp(t, *(part.delta("a") for part in parts)), 1e-7)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_karcher(seed):
    from mergekit.merge_methods.karcher import karcher_merge_tensors

    parts = skills(seed)
    weights = [0.2, 0.5, 0.3]
    expected = karcher_merge_tensors([part.delta("a") for part in parts], weights, max_iter=500, tol=1e-14)
    close(merge(parts, weights, method="karcher").delta("a"), expected, 1e-6)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_multislerp(seed):
    from mergekit.merge_methods.base import PerNonBase
    from mergekit.merge_methods.multislerp import multislerp

    parts, weights = skills(seed), [0.2, 0.5, 0.3]
    expected = multislerp.implementation(group(parts, base=False), weight=PerNonBase(dict(enumerate(weights))))
    close(merge(parts, weights, method="multislerp").delta("a"), expected, 1e-6)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_model_stock_of_skills_that_agree(seed):
    from mergekit.merge_methods.model_stock import model_stock_merge_method

    common = skills(seed)[0].scaled(3.0)
    parts = [merge([common, part], [1.0, 0.2]) for part in skills(seed + 1)]
    close(merge(parts, method="model_stock").delta("a"), model_stock_merge_method.implementation(group(parts)), 1e-6)


@given(seeds, st.sampled_from([0.25, 0.5, 1.0]))
@settings(max_examples=20, deadline=None)
def test_ties_at_equal_weights(seed, density):
    from mergekit.sparsify import SparsificationMethod

    parts = skills(seed)
    expected = task_arithmetic(parts, [1.0] * 3, consensus="sum", sparsify=SparsificationMethod.magnitude, density=density)
    found = merge(parts, method="ties", density=density, rank=9).delta("a")
    close(found, expected, 1e-9)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_sce(seed):
    from mergekit.merge_methods.sce import sce_merge

    parts = skills(seed)
    close(merge(parts, method="sce", density=1.0, rank=9).delta("a"), sce_merge.implementation(group(parts), select_topk=1.0), 1e-9)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_nearswap(seed):
    from mergekit.merge_methods.base import TensorGroup
    from mergekit.merge_methods.nearswap import nearswap_merge

    parts = skills(seed, 2)
    pair = TensorGroup.from_tensors([part.delta("a") for part in parts], base_index=0)
    close(merge(parts, method="nearswap", distance=0.3, rank=9).delta("a"), nearswap_merge.implementation(pair, 0.3), 1e-9)
