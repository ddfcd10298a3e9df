import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skillbank import Skill, merge
from skillbank.merge import METHODS
from tests.test_skill import flat, make

parents = st.lists(st.builds(make, st.integers(0, 10**6), st.tuples(st.integers(1, 5), st.integers(0, 6), st.integers(0, 3))), min_size=1, max_size=4)


@given(parents, st.integers(1, 4), st.data())
@settings(max_examples=50, deadline=None)
def test_the_certificate_tells_the_dense_truth(skills, rank, data):
    weights = data.draw(st.lists(st.floats(-2, 2).filter(lambda w: abs(w) > 0.01), min_size=len(skills), max_size=len(skills)))
    merged = merge(skills, weights, method="svd", rank=rank)
    total = sum(w * flat(s) for s, w in zip(skills, weights, strict=True))
    error = float((flat(merged) - total).norm() / total.norm())
    certificate = merged.certificate
    assert certificate.error == pytest.approx(error, abs=1e-9)
    assert certificate.energy == pytest.approx(float(flat(merged).square().sum() / total.square().sum()), abs=1e-8)
    assert certificate.ranks == merged.ranks
    assert certificate.exact == (error < 1e-13)
    assert set(certificate.errors) == set(merged)


@given(parents)
@settings(max_examples=30, deadline=None)
def test_stack_is_certified_exact_and_weights_default_to_the_mean(skills):
    merged = merge(skills)
    assert merged.certificate.exact
    torch.testing.assert_close(flat(merged), sum(flat(s) for s in skills) / len(skills))


def test_float32_is_exact_up_to_rounding():
    merged = merge([make(0, (2, 2, 2), torch.float32), make(1, (3, 3, 3), torch.float32)], [0.3, -0.7])
    assert merged.certificate.exact
    assert 0 < merged.certificate.error < 1e-6


def test_conflict_is_the_cosine_of_the_weighted_skills():
    one = make(0, (2, 2, 2))
    certificate = merge([one, one], [1.0, -0.5]).certificate
    assert certificate.conflict == [[pytest.approx(1), pytest.approx(-1)], [pytest.approx(-1), pytest.approx(1)]]


def test_skills_that_cancel():
    one = make(0, (2, 2, 2))
    certificate = merge([one, one], [1.0, -1.0]).certificate
    assert (certificate.exact, certificate.error) == (True, 0.0)
    halved = merge([one, one], [1.0, -1.0], method=lambda part: part.factors[0]).certificate
    assert (halved.exact, halved.error, halved.energy) == (False, math.inf, 0.0)


def test_svd_defaults_to_the_largest_rank_of_each_module():
    assert merge([make(0, (2, 2, 1)), make(1, (4, 1, 1))], method="svd").ranks == {"a": 4, "b": 2, "c": 1}


def test_an_error_instead_of_a_rank():
    skills = [make(i, (4, 4, 3)) for i in range(3)]
    assert merge(skills, method="svd", error=0.3).certificate.error <= 0.3
    assert merge(skills, method="svd", error=0.0).certificate.exact


def test_a_function_is_a_method_too():
    def halved(part):
        (a, b), weight = part.factors[0], part.weights[0]
        return a, b * (weight / 2)

    certificate = merge([make(0, (2, 2, 2))], [1.0], method=halved).certificate
    assert (certificate.method, certificate.exact, certificate.error) == ("halved", False, pytest.approx(0.5))


def test_the_certificate_is_plain_data():
    import json

    assert json.loads(json.dumps(merge([make(0, (2, 2, 2))]).certificate.to_dict()))["method"] == "stack"


def test_bad_input():
    one = make(0, (2, 2, 2))
    with pytest.raises(ValueError, match="needs at least one skill"):
        merge([])
    with pytest.raises(ValueError, match="got 1 weights for 2 skills"):
        merge([one, one], [1.0])
    with pytest.raises(ValueError, match="weights must be finite numbers, got 'half'"):
        merge([one], ["half"])
    assert torch.equal(merge([one], np.ones(1, np.float32)).delta("a"), one.delta("a"))
    with pytest.raises(ValueError, match="weights must be finite numbers, got nan"):
        merge([one], [float("nan")])
    with pytest.raises(ValueError, match="merge method '<lambda>' gives factors, from which nothing is cut: leave rank, error and budget out"):
        merge([one, one], method=lambda part: part.there[0], rank=1)
    with pytest.raises(ValueError, match="unknown merge method 'stak': did you mean 'stack'"):
        merge([one], method="stak")
    with pytest.raises(ValueError, match="unknown merge method 'zz': there is 'average', "):
        merge([one], method="zz")
    with pytest.raises(ValueError, match="merge method 'svd' takes no 'ranc': did you mean 'rank'"):
        merge([one], method="svd", ranc=3)


def test_a_method_is_registered_once():
    from skillbank.merge import method

    @method("first")
    def first(part):
        return part.factors[0]

    try:
        assert merge([make(0, (1, 1, 1))], [1.0], method="first").certificate.method == "first"
        with pytest.raises(ValueError, match="there is a merge method 'first' already"):
            method("first")(first)
    finally:
        del METHODS["first"]


def test_every_method_is_documented():
    assert all(entry.function.__doc__ for entry in METHODS.values())


@pytest.mark.parametrize("method", ["stack", "svd", "average", "tsv_m", "ties", "karcher"])
def test_weights_by_pattern_are_weights_module_by_module(method):
    skills = [make(0, (3, 2, 2)), make(1, (2, 0, 1)), make(2, (1, 4, 0))]
    options = {"rank": 99} if method in ("svd", "ties") else {}
    merged = merge(skills, [{"*": 0.2, "a*": 0.9}, 0.5, {"[ab]": 0.3, "c": 1.0}], method=method, **options)
    for module, weights in {"a": [0.9, 0.5, 0.3], "b": [0.2, 0.5, 0.3], "c": [0.2, 0.5, 1.0]}.items():
        whole = merge(skills, weights, method=method, **options)
        torch.testing.assert_close(merged.delta(module), whole.delta(module))
    assert merged.certificate.errors["a"] == pytest.approx(merge(skills, [0.9, 0.5, 0.3], method=method, **options).certificate.errors["a"])


def test_bad_weights_by_pattern():
    skills = [make(0, (3, 2, 2)), make(1, (2, 0, 1))]
    with pytest.raises(ValueError, match=r"module 'b' fits none of the patterns \['a', 'c'\]: give a weight for '\*', the rest"):
        merge(skills, [{"a": 1.0, "c": 2.0}, 1.0])
    with pytest.raises(ValueError, match=r"the pattern 'aa' fits no module of the skills, which have \['a', 'b', 'c'\]"):
        merge(skills, [{"aa": 1.0, "*": 2.0}, 1.0])
    with pytest.raises(ValueError, match="got 1 weights for 2 skills"):
        merge(skills, torch.tensor(0.5))
    with pytest.raises(ValueError, match="all weights are 0 where the skills have modules"):
        merge([skills[0].part("a"), skills[1].part("c")], [{"a": 0.0, "*": 1.0}, {"c": 0.0, "*": 1.0}])


def test_a_certificate_of_a_cut():
    skills = [make(i, (4, 4, 3)) for i in range(3)]
    full, short = merge(skills, method="tsv_m"), merge(skills, method="tsv_m", rank=2)
    assert full.certificate.cut == 0.0
    assert short.certificate.cut == pytest.approx(float((flat(full) - flat(short)).norm() / flat(full).norm()), rel=1e-6)
    assert merge(skills, method="svd", rank=2).certificate.cut is None
    split = merge(skills, [{"a": 1.0, "*": 0.5}, 1.0, 1.0], method="tsv_m", rank=2)
    whole = merge(skills, [{"a": 1.0, "*": 0.5}, 1.0, 1.0], method="tsv_m")
    assert split.certificate.cut == pytest.approx(float((flat(whole) - flat(split)).norm() / flat(whole).norm()), rel=1e-6)


def test_how_many_directions_a_merge_has_and_what_cancels():
    skills = [make(i, (4, 4, 3)) for i in range(3)]
    effective = merge(skills, method="iso_c").certificate.effective_ranks
    assert effective == {name: pytest.approx(rank) for name, rank in merge(skills, method="iso_c").ranks.items()}
    one = skills[0]
    assert merge([one, one], [1.0, 1.0]).certificate.cancelled == 0.0
    assert merge([one, one], [1.0, -1.0]).certificate.cancelled == 1.0
    assert merge([one, one], [1.0, -0.5]).certificate.cancelled == pytest.approx(1 - 0.25 / 1.25)


def test_a_budget_goes_to_the_largest_singular_values():
    skills = [make(i, (4, 4, 3)) for i in range(2)]
    merged = merge([skills[0].scaled({"a": 10.0}), skills[1]], [1.0, 1.0], method="svd", budget=9)
    assert sum(merged.ranks.values()) == 9
    whole = merge([skills[0].scaled({"a": 10.0}), skills[1]], [1.0, 1.0])
    values = sorted((float(s) for name in "abc" for s in torch.linalg.svdvals(whole.delta(name).flatten(1))), reverse=True)
    kept = sorted((float(s) for name in "abc" for s in torch.linalg.svdvals(merged.delta(name).flatten(1))[: merged.ranks[name]]), reverse=True)
    assert min(merged.ranks.values()) >= 1
    assert kept[:7] == pytest.approx(values[:7])
    with pytest.raises(ValueError, match="a budget of 2 ranks is too small for 3 modules"):
        merge(skills, method="svd", budget=2)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("fisher", "regmean")])
def test_a_skill_at_weight_zero_is_absent_with_its_modules(method):
    one, two = make(0, (3, 0, 2)), make(1, (2, 0, 0))
    other = Skill(dict(make(2, (5, 5, 3)).factors))
    skills, weights = ([one, two, other], [1.0, 0.5, 0.0])
    merged = merge(skills, weights, method=method)
    torch.testing.assert_close(flat(merged), flat(merge(skills[:2], weights[:2], method=method)))
    assert merged.ranks == merge(skills[:2], weights[:2], method=method).ranks
    assert merged.certificate.errors["b"] == 0.0


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("fisher", "regmean")])
def test_deltas_of_zeros(method):
    fresh = Skill({name: (a, torch.zeros_like(b)) for name, (a, b) in make(0, (3, 2, 2)).factors.items()})
    assert not flat(merge([fresh, fresh], [1.0, 0.5], method=method)).any()
    skill = make(1, (2, 2, 1))
    merged = merge([skill, fresh], [1.0, 1.0], method=method)
    assert torch.isfinite(flat(merged)).all()


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if entry.first])
def test_the_first_skill_cannot_be_absent_where_it_is_the_one_that_stays(method):
    with pytest.raises(ValueError, match=f"the first skill has weight 0, but '{method}' starts from it"):
        merge([make(0, (3, 2, 2)), make(1, (2, 2, 1))], [0.0, 1.0], method=method)


@pytest.mark.parametrize(("dtype", "eps"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10), (torch.float32, 2**-23)])
def test_exact_means_up_to_the_rounding_of_the_dtype(dtype, eps):
    skills = [make(i, (4, 4, 3), dtype) for i in range(2)]
    assert merge(skills, [0.3, -0.7], method="tsv_m").certificate.cut == 0.0
    stacked = merge(skills, [0.3, -0.7]).certificate
    assert stacked.exact
    assert stacked.error < eps

    def wrong(part):
        return METHODS["stack"].function(replace(part, weights=part.weights * (1 + 3 * eps)))

    damaged = merge(skills, [0.3, -0.7], method=wrong)
    assert not damaged.certificate.exact


def test_different_dtypes_are_summed_in_the_wider_one():
    one, two = make(0, (4, 4, 3), torch.bfloat16), make(1, (4, 4, 3), torch.float32)
    merged = merge([one, two], [0.3, 0.7])
    assert merged["a"][0].dtype == torch.float32
    assert merged.certificate.exact
    torch.testing.assert_close(flat(merged), 0.3 * flat(one.to(dtype=torch.float64)) + 0.7 * flat(two.to(dtype=torch.float64)), rtol=1e-5, atol=1e-5)
    mixed = Skill({"a": (one["a"][0], two["a"][1])})
    assert merge([mixed], [1.0])["a"][1].dtype == mixed.delta("a").dtype == torch.float32


def test_rounding_is_no_direction():
    skill = make(0, (3, 2, 2), torch.float32)
    q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))[0]
    a, b = skill["a"]
    other = Skill({**skill.factors, "a": ((q.mT @ a.flatten(1)).reshape(a.shape), b @ q)})
    for method in ("iso_c", "tsv_m", "wudi", "iso_cts"):
        merged = merge([skill, other], [0.5, 0.5], method=method)
        assert merged.ranks["a"] == (2 if method == "iso_cts" else 3), method
        assert float(merged.norm()) < 2 * float(skill.norm()), method


def test_skills_that_do_not_go_together():
    one = make(0, (3, 2, 2))
    a, b = one["a"]
    with pytest.raises(ValueError, match="module 'a' has another size in another skill"):
        merge([one, Skill({"a": (a[:, :2], b)})], method="ties")
    with pytest.raises(ValueError, match="rank must be at least 1, got -20"):
        merge([one], method="ties", rank=-20)
    with pytest.raises(ValueError, match="inner merge method 'stack' does not work entry by entry"):
        merge([one], method="knots", inner="stack")
    with pytest.raises(ValueError, match="merge method 'ties' takes no 'densty': did you mean 'density'"):
        merge([one], method="knots", options={"densty": 0.3})
    with pytest.raises(ValueError, match="add up to 0, so that there is no average"):
        merge([one], [0.0], method="average")
    with pytest.raises(ValueError, match="points opposite to the mean"):
        merge([one, one, one.scaled(-1.0)], method="karcher")


def test_an_error_without_measure_is_none_in_a_card():
    one = make(0, (2, 2, 2))
    told = merge([one, one], [1.0, -1.0], method="magmax").certificate.to_dict()
    assert told["error"] is None
    json.dumps(told, allow_nan=False)


@pytest.fixture(scope="module")
def large():
    """Two skills on a layer of more than one tile, at which a sample brackets thresholds and fits go by subspace iteration."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(16, 0.5), (8, 2.0)]
    return [Skill({"a": (torch.randn(r, 1200, generator=generator), scale * torch.randn(1100, r, generator=generator))}) for r, scale in sizes]


def test_thresholds_are_exact_and_fits_near_the_best(large):
    merged = merge(large, [1.0, -0.7], method="magnitude", density=0.1, rank=250)
    weighted = torch.stack([large[0].delta("a"), -0.7 * large[1].delta("a")])
    cut = weighted.abs().flatten(1).sort(descending=True).values[:, 132_000 - 1]
    exact = torch.where(weighted.abs() >= cut[:, None, None], weighted, 0).sum(0)
    values = torch.linalg.svdvals(exact)
    error = float((merged.delta("a") - exact).norm() / exact.norm())
    assert merged.certificate.cut == pytest.approx(error, rel=1e-3)
    best = float(values[250:].norm() / values.norm())
    assert 0.999 * best <= error < 1.05 * best


def test_a_result_of_low_rank_is_found_exactly(large):
    merged = merge(large, [1.0, -0.7], method="magnitude", density=1.0)
    exact = large[0].delta("a") - 0.7 * large[1].delta("a")
    assert merged.ranks == {"a": 24}
    torch.testing.assert_close(merged.delta("a"), exact, rtol=1e-3, atol=1e-3)
    assert merged.certificate.cut < 1e-3
    assert merged.certificate.error < 1e-5


def test_what_is_drawn_does_not_depend_on_the_rank_of_the_fit(large):
    wide, narrow = (merge(large, method="dare", density=0.9, rank=rank) for rank in (60, 24))
    cut = merge([wide], [1.0], method="svd", rank=24)
    assert float((cut.delta("a") - narrow.delta("a")).norm() / narrow.norm()) < 0.1
