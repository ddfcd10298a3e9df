"""The laws of merging for every method, and a dense oracle in float64 for each."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skillbank import Skill, merge
from skillbank.merge import LAWS, METHODS
from tests.test_skill import SHAPES, close, dense, flat, make

PAIRS = {"slerp", "nuslerp"}
EXACT = {"svd": {"error": 0.0}}
"""Options that make a method exact, where its default cuts."""
seeds = st.integers(0, 10**6)


def skills_for(method, seed, count=3):
    """Skills of mixed ranks, some without one of the modules."""
    count = min(count, 2) if method in PAIRS else count
    ranks = [(3, 2, 2), (2, 0, 1), (1, 4, 0)]
    return [make(seed + k, ranks[k]) for k in range(count)]


def weights_for(count, seed):
    return (0.2 + torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).tolist()


def run(method, skills, weights, **options):
    return merge(skills, weights, method=method, **{**EXACT.get(method, {}), **options})


def holds(law):
    return [name for name, entry in METHODS.items() if law not in entry.breaks]


def test_reasons_are_given_for_known_laws():
    for name, entry in METHODS.items():
        assert set(entry.breaks) <= set(LAWS), name
        assert all(reason.strip() for reason in entry.breaks.values()), name


@pytest.mark.parametrize("method", holds("single"))
@given(seed=seeds)
@settings(max_examples=8, deadline=None)
def test_one_skill_at_weight_one_is_itself(method, seed):
    for skill in skills_for(method, seed):
        close(flat(run(method, [skill], [1.0])), flat(skill), 1e-9)


@pytest.mark.parametrize("method", holds("order"))
@given(seed=seeds, data=st.data())
@settings(max_examples=8, deadline=None)
def test_order_does_not_matter(method, seed, data):
    skills = skills_for(method, seed)
    weights, order = weights_for(len(skills), seed), data.draw(st.permutations(range(len(skills))))
    close(flat(run(method, [skills[i] for i in order], [weights[i] for i in order])), flat(run(method, skills, weights)), 1e-8)


@pytest.mark.parametrize("method", holds("zero"))
@given(seed=seeds)
@settings(max_examples=8, deadline=None)
def test_weight_zero_is_absent(method, seed):
    skills = skills_for(method, seed)
    weights = weights_for(len(skills), seed)
    close(flat(run(method, [*skills, make(seed + 9, (5, 5, 3))], [*weights, 0.0])), flat(run(method, skills, weights)), 1e-9)


@pytest.mark.parametrize("method", holds("gauge"))
@given(seed=seeds)
@settings(max_examples=8, deadline=None)
def test_how_the_factors_are_stored_does_not_matter(method, seed):
    skills = skills_for(method, seed)
    weights, generator = weights_for(len(skills), seed), torch.Generator().manual_seed(seed)

    def other(skill):
        factors = {}
        for name, (a, b) in skill.factors.items():
            q = torch.linalg.qr(torch.randn(len(a), len(a), generator=generator, dtype=a.dtype))[0] * 3
            factors[name] = (torch.linalg.solve(q, a.flatten(1)).reshape(a.shape), b @ q)
        return Skill(factors)

    close(flat(run(method, [other(skill) for skill in skills], weights)), flat(run(method, skills, weights)), 1e-7)


@pytest.mark.parametrize("method", METHODS)
@given(seed=seeds)
@settings(max_examples=8, deadline=None)
def test_negative_weights_are_right_or_refused(method, seed):
    skills = skills_for(method, seed)
    weights = weights_for(len(skills), seed)
    opposite = [-w for w in weights]
    if "sign" not in METHODS[method].breaks:
        close(flat(run(method, skills, opposite)), -flat(run(method, skills, weights)), 1e-8)
    elif method == "average":
        close(flat(run(method, skills, opposite)), flat(run(method, skills, weights)), 1e-9)
    else:
        with pytest.raises(ValueError, match="negative weight"):
            run(method, skills, opposite)


# Oracles: the same formulas on dense float64 matrices.


def matrices(skills, name):
    return [dense(skill, name).flatten(1) for skill in skills]


def angle(a, b):
    return torch.arccos(((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1))


def slerp(deltas, weights):
    a, b = deltas
    if not a.norm() * b.norm():
        return (weights[0] * a + weights[1] * b) / sum(weights)
    theta, t = angle(a, b), weights[1] / sum(weights)
    return (torch.sin((1 - t) * theta) * a + torch.sin(t * theta) * b) / torch.sin(theta)


def nuslerp(deltas, weights):
    a, b = deltas
    if not a.norm() * b.norm():
        return (weights[0] * a + weights[1] * b) / sum(weights)
    t = weights[1] / sum(weights)
    return slerp([a / a.norm(), b / b.norm()], weights) * ((1 - t) * a.norm() + t * b.norm())


def karcher(deltas, weights, steps=2000):
    there = [(d / d.norm(), w) for d, w in zip(deltas, weights, strict=True) if d.norm()]
    mean = sum(w * u for u, w in there)
    mean = mean / mean.norm()
    for _ in range(steps):
        tangent = torch.zeros_like(mean)
        for u, w in there:
            theta = angle(u, mean)
            if theta > 1e-9:
                tangent += w / sum(weights) * theta / torch.sin(theta) * (u - torch.cos(theta) * mean)
        if tangent.norm() < 1e-13:
            break
        mean = torch.cos(tangent.norm()) * mean + torch.sin(tangent.norm()) * tangent / tangent.norm()
    return mean * sum(w * d.norm() for d, w in zip(deltas, weights, strict=True)) / sum(weights)


def model_stock(deltas, weights):
    count = len(deltas)
    pairs = [(a, b) for i, a in enumerate(deltas) for b in deltas[:i]]
    c = max(0.0, sum(float((a * b).sum() / (a.norm() * b.norm())) if a.norm() * b.norm() else 0.0 for a, b in pairs) / len(pairs))
    return count * c / (1 + (count - 1) * c) * sum(w * d for d, w in zip(deltas, weights, strict=True)) / sum(weights)


def truncated(matrix, rtol=1e-10):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((s > rtol * s[0]).sum()) if s[0] > 0 else 0
    return u[:, :rank], s[:rank], vh[:rank]


def procrustes(matrix):
    u, _, vh = truncated(matrix, 1e-5)
    return u @ vh


def tsv_m(deltas, weights):
    parts = [truncated(w * d) for d, w in zip(deltas, weights, strict=True)]
    left, right = torch.cat([u for u, _, _ in parts], dim=1), torch.cat([vh for _, _, vh in parts])
    return procrustes(left) @ torch.diag(torch.cat([s for _, s, _ in parts])) @ procrustes(right)


def iso_c(deltas, weights):
    u, s, vh = truncated(sum(w * d for d, w in zip(deltas, weights, strict=True)))
    return s.mean() * u @ vh


def iso_cts(deltas, weights):
    weighted = [w * d for d, w in zip(deltas, weights, strict=True)]
    u, s, vh = truncated(sum(weighted))
    first = max(1, round(0.8 * len(s)))
    own = (len(s) - first) // len(deltas)
    lefts, values, rights = [u[:, :first]], [s[:first]], [vh[:first]]
    for each in weighted:
        rest = each - u[:, :first] @ u[:, :first].mT @ each
        a, b, c = torch.linalg.svd(rest, full_matrices=False)
        q = min(own, int((b > 1e-10 * each.norm()).sum()))
        lefts, values, rights = [*lefts, a[:, :q]], [*values, b[:q]], [*rights, c[:q]]
    return torch.cat(values).mean() * procrustes(torch.cat(lefts, 1)) @ procrustes(torch.cat(rights, 0))


def opcm(deltas, weights):
    weighted = [w * d for d, w in zip(deltas, weights, strict=True)]
    total, scale = torch.zeros_like(weighted[0]), 1.0
    for count, each in enumerate(weighted, 1):
        if not any(d.norm() for d in weighted[:count]):
            continue
        u, s, vh = torch.linalg.svd(total)
        top = int((s.cumsum(0) < 0.5 * s.sum()).sum()) + 1 if s.sum() else 0
        coordinates = u.mT @ each @ vh.mT
        coordinates[:top] = 0
        coordinates[:, :top] = 0
        total = scale * total + u @ coordinates @ vh
        scale = total.norm() / (sum(d.norm() for d in weighted[:count]) / count)
        total = total / scale
    return total


def wudi(deltas, weights):
    """By descent on the normal equations: the minimum-norm minimiser of the sum of squares, from lstsq."""
    weighted = [w * d for d, w in zip(deltas, weights, strict=True) if d.norm()]
    rows = torch.cat([d.mT / d.norm() for d in weighted], dim=1)
    aims = torch.cat([d @ d.mT / d.norm() for d in weighted], dim=1)
    return torch.linalg.lstsq(rows.mT, aims.mT, driver="gelsd").solution.mT


def subtract_common(deltas, weights):
    return weights[0] * deltas[0] - sum(w * d for d, w in zip(deltas[1:], weights[1:], strict=True)) / (len(deltas) - 1)


def project_out(deltas, weights):
    left = truncated(torch.cat(deltas[1:], dim=1))[0]
    right = truncated(torch.cat(deltas[1:], dim=0))[2]
    return weights[0] * (deltas[0] - left @ left.mT @ deltas[0] @ right.mT @ right)


ORACLES = {
    "stack": lambda deltas, weights: sum(w * d for d, w in zip(deltas, weights, strict=True)),
    "svd": lambda deltas, weights: sum(w * d for d, w in zip(deltas, weights, strict=True)),
    "average": lambda deltas, weights: sum(w * d for d, w in zip(deltas, weights, strict=True)) / sum(weights),
    "slerp": slerp,
    "nuslerp": nuslerp,
    "karcher": karcher,
    "multislerp": lambda deltas, weights: karcher(deltas, weights, steps=1),
    "model_stock": model_stock,
    "tsv_m": tsv_m,
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "opcm": opcm,
    "wudi": wudi,
    "subtract_common": subtract_common,
    "project_out": project_out,
}


def test_every_method_has_an_oracle():
    assert set(ORACLES) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
@given(seed=seeds)
@settings(max_examples=12, deadline=None)
def test_a_method_is_its_dense_formula(method, seed):
    skills = skills_for(method, seed)
    weights = weights_for(len(skills), seed)
    merged = run(method, skills, weights)
    for name in SHAPES:
        close(dense(merged, name).flatten(1), ORACLES[method](matrices(skills, name), weights), 1e-7)
