"""The laws of merging for every method, and a dense oracle in float64 for each."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skillbank import Skill, dense_merge, merge
from skillbank.merge import LAWS, METHODS
from tests.test_skill import SHAPES, close, dense, flat, make

PAIRS = {"slerp", "nuslerp", "nearswap"}
ENTRIES = {"fisher", *(name for name, entry in METHODS.items() if hasattr(entry.function, "entries"))}
RANDOM = {"dare", "dare_ties", "della", "della_ties"}
EXACT = {"svd": {"error": 0.0}, **{name: {"rank": 99} for name in ENTRIES}}
"""Options that make a method exact, where its default cuts."""
seeds = st.integers(0, 10**6)


def skills_for(method, seed, count=3):
    """Skills of mixed ranks, some without one of the modules."""
    count = min(count, 2) if method in PAIRS else count
    ranks = [(3, 2, 2), (2, 0, 1), (1, 4, 0)]
    return [make(seed + k, ranks[k]) for k in range(count)]


def weights_for(count, seed):
    return (0.2 + torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).tolist()


def gram_of(seed):
    """Gram matrices of inputs, one per module, of a task of its own."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {name: torch.randn(torch.Size(inner).numel(), 40, generator=generator, dtype=torch.float64) for name, (_, inner) in SHAPES.items()}
    return {name: x @ x.mT for name, x in inputs.items()}


def fisher_of(seed):
    """Fisher factors, one pair per module, of a task of its own; some entries do not matter at all."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {name: (out, torch.Size(inner).numel()) for name, (out, inner) in SHAPES.items()}
    return {
        name: tuple(torch.randn(size, generator=generator, dtype=torch.float64).clamp_min(0) * 1e-9 for size in pair) for name, pair in sizes.items()
    }


NEEDS = {"regmean": ("grams", gram_of), "fisher": ("fishers", fisher_of)}
"""Methods that need to know more of every skill's task."""


def needed(method, skills):
    """What belongs to the skills, whatever their places in the list."""
    if method not in NEEDS:
        return {}
    key, make_one = NEEDS[method]
    return {key: [make_one(round(1e6 * float(flat(skill).norm()))) for skill in skills]}


def run(method, skills, weights, **options):
    options |= needed(method, skills)
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


@pytest.mark.parametrize("method", METHODS)
def test_a_dense_merge_is_the_merge_before_it_is_cut(method):
    skills = skills_for(method, 3)
    weights = weights_for(len(skills), 3)
    options = needed(method, skills)
    dense = dense_merge(skills, weights, method, **options)
    merged = merge(skills, weights, method, **options, **EXACT.get(method, {}))
    assert list(dense) == list(merged)
    for name in merged:
        assert dense.size(name) == merged.size(name)
        close(dense.delta(name), merged.delta(name), 1e-9)


@pytest.mark.parametrize("method", ["stack", "average", "svd"])
def test_a_dense_merge_of_skills_in_16_bits_is_summed_in_32(method):
    skills = [Skill({"a": (torch.randn(8, 64), torch.randn(64, 8))}).to(dtype=torch.bfloat16) for _ in range(2)]
    exact = dense_merge([skill.to(dtype=torch.float64) for skill in skills], method=method).delta("a")
    close(dense_merge(skills, method=method).delta("a", torch.float32).double(), exact, 1e-5)


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
    return torch.stack([slerp(list(rows), weights) for rows in zip(*deltas, strict=True)])


def karcher(deltas, weights, steps=2000, project=False):
    there = [(d / d.norm(), w) for d, w in zip(deltas, weights, strict=True) if d.norm()]
    mean = sum(w * u for u, w in there)
    mean = mean / mean.norm()
    for _ in range(steps):
        tangent = torch.zeros_like(mean)
        for u, w in there:
            theta = angle(u, mean)
            if theta > 1e-9:
                tangent += w / sum(weights) * (1 if project else theta / torch.sin(theta)) * (u - torch.cos(theta) * mean)
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
        u, s, vh = truncated(total)
        taken = torch.zeros_like(total)
        top = int((s.cumsum(0) <= 0.5 * s.sum()).sum())
        for i in range(len(s)):
            for j in range(len(s)):
                if i == j or max(i, j) < top:
                    taken += (u[:, i] @ each @ vh[j]) * torch.outer(u[:, i], vh[j])
        total = scale * total + each - taken
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


def share_of(weighted, density):
    """Entries of every delta that are among its largest."""
    count = max(1, round(density * weighted[0].numel()))
    return [d * (d.abs() >= d.abs().flatten().sort(descending=True).values[count - 1]) for d in weighted]


def agreeing(parts):
    stacked = torch.stack(parts)
    agrees = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    return torch.where(agrees, stacked, 0).sum(0) / agrees.sum(0).clamp_min(1)


def crumbs(weighted, density=0.85, outliers=0.01):
    large, kept = share_of(weighted, outliers), share_of(weighted, density + outliers)
    return [torch.where(most != 0, 0, each) for most, each in zip(large, kept, strict=True)]


def sce(weighted, density=0.5):
    stacked = torch.stack(weighted)
    spread = stacked.var(0, correction=0)
    count = max(1, round(density * spread.numel()))
    chosen = stacked * (spread >= spread.flatten().sort(descending=True).values[count - 1])
    energy = chosen.square().sum((1, 2))[:, None, None]
    agrees = chosen.sign() == chosen.sum(0).sign()
    return (energy * chosen * agrees).sum(0) / (energy * agrees).sum(0).clamp_min(1e-300)


def magmax(weighted):
    stacked = torch.stack(weighted)
    return torch.gather(stacked, 0, stacked.abs().argmax(0)[None])[0]


def emr(weighted):
    sign = sum(weighted).sign()
    return sign * torch.stack([torch.where(d.sign() == sign, d.abs(), 0) for d in weighted]).amax(0)


def consensus(weighted):
    total = sum(weighted)
    votes = sum((d.abs() >= (total - d).abs()).int() for d in weighted)
    return torch.where(votes >= 2, total, 0)


def tall_mask(weighted):
    total = sum(weighted)
    return torch.where(weighted[0].abs() >= (total - weighted[0]).abs(), total, 0)


def nearswap(weighted, distance=0.001):
    a, b = weighted
    gap = (b - a).abs()
    return a + torch.where(gap > distance, distance / gap.clamp_min(1e-300), 1) * (b - a)


def on_weighted(function):
    return lambda deltas, weights: function([w * d for d, w in zip(deltas, weights, strict=True)])


def knots(deltas, weights):
    stacked = torch.cat([w * d for d, w in zip(deltas, weights, strict=True)], dim=1)
    u, s, vh = truncated(stacked)
    return u * s @ agreeing(share_of(list(vh.split(deltas[0].shape[1], dim=1)), 0.2))


def core_space(deltas, weights):
    weighted = [w * d for d, w in zip(deltas, weights, strict=True)]
    u, right = truncated(torch.cat(weighted, dim=1))[0], truncated(torch.cat(weighted, dim=0))[2].mT
    return u @ agreeing(share_of([u.mT @ d @ right for d in weighted], 0.2)) @ right.mT


ORACLES = {
    "knots": knots,
    "core_space": core_space,
    "magnitude": on_weighted(lambda deltas: sum(share_of(deltas, 0.5))),
    "ties": on_weighted(lambda deltas: agreeing(share_of(deltas, 0.2))),
    "breadcrumbs": on_weighted(lambda deltas: sum(crumbs(deltas))),
    "breadcrumbs_ties": on_weighted(lambda deltas: agreeing(crumbs(deltas))),
    "sce": on_weighted(sce),
    "magmax": on_weighted(magmax),
    "emr": on_weighted(emr),
    "consensus": on_weighted(consensus),
    "tall_mask": on_weighted(tall_mask),
    "nearswap": on_weighted(nearswap),
    "stack": lambda deltas, weights: sum(w * d for d, w in zip(deltas, weights, strict=True)),
    "svd": lambda deltas, weights: sum(w * d for d, w in zip(deltas, weights, strict=True)),
    "average": lambda deltas, weights: sum(w * d for d, w in zip(deltas, weights, strict=True)) / sum(weights),
    "slerp": slerp,
    "nuslerp": nuslerp,
    "karcher": karcher,
    "multislerp": lambda deltas, weights: karcher(deltas, weights, steps=1, project=True),
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
    assert {*ORACLES, *RANDOM, *NEEDS} == set(METHODS)


@pytest.mark.parametrize("method", ORACLES)
@given(seed=seeds)
@settings(max_examples=12, deadline=None)
def test_a_method_is_its_dense_formula(method, seed):
    skills = skills_for(method, seed)
    weights = weights_for(len(skills), seed)
    merged = run(method, skills, weights)
    for name in SHAPES:
        close(dense(merged, name).flatten(1), ORACLES[method](matrices(skills, name), weights), 1e-7)


@given(seed=seeds)
@settings(max_examples=12, deadline=None)
def test_regmean_is_the_least_squares_solution(seed):
    skills = skills_for("regmean", seed)
    weights, grams = weights_for(3, seed), [gram_of(seed + k) for k in range(3)]
    merged = merge(skills, weights, method="regmean", grams=grams, diagonal=0.0)
    for name in SHAPES:
        sums = sum(w * g[name] for w, g in zip(weights, grams, strict=True))
        pulled = sum(w * d @ g[name] for w, d, g in zip(weights, matrices(skills, name), grams, strict=True))
        close(dense(merged, name).flatten(1), pulled @ torch.linalg.inv(sums), 1e-4)
    with pytest.raises(ValueError, match=r"diagonal is a share in \[0, 1\], got 5"):
        merge(skills, weights, method="regmean", grams=grams, diagonal=5)


@given(seeds)
@example(243)  # to the skills that have the module nothing in it matters, to the one that lacks it something does
@settings(max_examples=12, deadline=None)
def test_fisher_is_the_mean_by_importance(seed):
    skills = skills_for("fisher", seed)
    weights, fishers = weights_for(3, seed), needed("fisher", skills)["fishers"]
    merged = run("fisher", skills, weights)
    for name in SHAPES:
        factors = [[half + 1e-6 * half.mean() for half in each[name]] for each in fishers]
        matters = torch.stack([w * torch.outer(*pair) for w, pair in zip(weights, factors, strict=True)])
        expected = (matters * torch.stack(matrices(skills, name))).sum(0) / matters.sum(0)
        close(matrices([merged], name)[0], expected, 1e-8)


@pytest.mark.parametrize("method", sorted(RANDOM))
def test_what_is_drawn_follows_the_seed_and_is_independent_of_rank(method):
    skills = skills_for(method, 0)
    first, second, other = (flat(merge(skills, method=method, rank=99, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("method", ["dare", "della"])
def test_what_is_dropped_at_random_is_right_on_average(method):
    skills, weights = skills_for(method, 5), [0.7, -0.4, 0.3]
    total = sum(w * flat(s) for s, w in zip(skills, weights, strict=True))
    draws = torch.stack([flat(merge(skills, weights, method=method, rank=99, seed=10**6 * seed)) for seed in range(400)])
    noise = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - total).abs() <= 5 * noise + 1e-9).all()


def test_della_keeps_every_entry_with_some_probability():
    skills = skills_for("della", 2)
    with pytest.raises(ValueError, match="spread must leave all probabilities in"):
        merge(skills, method="della", density=0.3, spread=0.3)
    assert torch.isfinite(flat(merge(skills, method="della", density=0.3, spread=0.29))).all()


def test_dare_and_della_keep_the_share_that_they_are_told():
    generator = torch.Generator().manual_seed(0)
    skill = Skill({"a": (torch.randn(8, 300, generator=generator), torch.randn(200, 8, generator=generator))})
    delta = skill.delta("a")
    dropped = merge([skill], [1.0], method="dare", density=0.3, rank=200).delta("a")
    kept = dropped.abs() > 1e-3 * delta.abs().mean()
    assert kept.float().mean() == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(dropped[kept], delta[kept] / 0.3, atol=1e-3, rtol=1e-3)
    pruned = merge([skill], [1.0], method="della", density=0.5, spread=0.4, rank=200).delta("a")
    kept = pruned.abs() > 1e-3 * delta.abs().mean()
    small = delta.abs() < delta.abs().median(dim=1, keepdim=True).values
    assert kept[small].float().mean() == pytest.approx(0.3, abs=0.02)
    assert kept[~small].float().mean() == pytest.approx(0.7, abs=0.02)
    place = delta.abs().argsort(1).argsort(1) / 299
    torch.testing.assert_close(pruned[kept], (delta / (0.1 + 0.8 * place))[kept], atol=2e-3, rtol=1e-3)
