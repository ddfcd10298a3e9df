"""Second oracle: fusion_bench's functions on dense deltas of full rank, where all directions that it merges exist.

Skipped where it is not installed.

pip install --no-deps fusion_bench==0.2.33 bidict lightning lightning-utilities torchmetrics datasets multiprocess dill pyarrow xxhash
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skillbank import Skill, merge
from tests.tiny import close

pytestmark = pytest.mark.peers
iso = pytest.importorskip("fusion_bench.method.isotropic_merging.iso_utils", reason="fusion_bench is not installed")
tsv = pytest.importorskip("fusion_bench.method.task_singular_vector.utils.TSVM_utils", reason="fusion_bench is not installed")
seeds = st.integers(0, 10**6)


def skills(seed, count=3, out=12, inner=9):
    generator = torch.Generator().manual_seed(seed)
    return [
        Skill({"a": tuple(torch.randn(size, generator=generator, dtype=torch.float64) for size in ((inner, inner), (out, inner)))})
        for _ in range(count)
    ]


def dense(parts):
    return [{"a": part.delta("a")} for part in parts]


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_isotropic(seed):
    parts = skills(seed)
    close(merge(parts, method="iso_c").delta("a"), iso.iso_c(dense(parts), accelerator="cpu")["a"], 1e-8)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_task_singular_vectors(seed):
    parts = skills(seed)
    expected = tsv.compute_and_sum_svd_mem_reduction(dense(parts), accelerator="cpu")["a"]
    close(merge(parts, method="tsv_m", keep=1 / 3).delta("a"), expected, 1e-8)
