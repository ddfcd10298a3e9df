"""Verdicts on the paper's claims: what comparisons come to on values whose answer is known, and the page that shows them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_ind, ttest_rel

from benchmarks.claims import keeps_the_limit, page, safe_and_above
from benchmarks.comparisons import Claim, Comparison, Row, by_name
from benchmarks.intervals import difference

ROOT = Path(__file__).parents[1]


def seeds(mean, *, spread=1.0, count=3, episodes=10):
    generator = np.random.default_rng(int(abs(mean)) + count)
    return Row({seed: list(mean + spread * generator.standard_normal(episodes)) for seed in range(count)})


NONE = Row({})


@pytest.mark.parametrize(
    ("higher", "lower", "verdict"),
    [
        (seeds(20), seeds(10), "holds"),
        (seeds(10), seeds(20), "fails"),
        (seeds(10, spread=50.0), seeds(11, spread=50.0), "unclear"),
        (seeds(20), 10.0, "holds"),
        (seeds(20, count=2), seeds(10), "too few seeds"),
        (seeds(20), seeds(10, count=1), "too few seeds"),
        (seeds(20), NONE, "missing"),
    ],
)
def test_a_comparison(higher, lower, verdict):
    assert Comparison("", higher, lower).verdict == verdict


def test_what_nobody_trained_is_one_seed_for_all():
    assert Comparison("", seeds(20), seeds(10, count=1), untrained=True).verdict == "holds"
    assert Comparison("", seeds(20), NONE, untrained=True).verdict == "missing"


def test_an_interval_holds_what_seeds_and_episodes_vary():
    one = Comparison("", seeds(20, episodes=2000), seeds(10, episodes=2000))
    assert one.effect == pytest.approx(10, abs=0.1)
    low, high = one.interval
    assert low < one.effect < high < low + 0.4
    apart = Row({0: [18.0] * 10, 1: [20.0] * 10, 2: [22.0] * 10})  # only seeds differ
    low, high = Comparison("", apart, 10.0).interval
    assert low == pytest.approx(10 - 4.303 * 2 / 3**0.5, abs=1e-3)  # Student's t of two degrees of freedom
    assert high == pytest.approx(10 + 4.303 * 2 / 3**0.5, abs=1e-3)
    assert Comparison("", Row({0: [3.0], 1: [3.0], 2: [3.0]}), Row({0: [1.0], 1: [1.0]})).interval == (2.0, 2.0)


def test_rows_of_the_same_skills_are_compared_seed_by_seed():
    values = {0: [10.0, 12.0], 1: [200.0, 202.0], 2: [55.0, 57.0]}
    one, two = Row({seed: [each + 3 + seed for each in some] for seed, some in values.items()}), Row({**values, 3: [900.0]})
    assert Comparison("", one, two).verdict == "unclear"
    alike = Comparison("", replace(one, made_of=frozenset("ab")), replace(two, made_of=frozenset("bc")))
    found = ttest_rel([np.mean(each) for each in one.per_seed], [np.mean(each) for each in values.values()]).confidence_interval(0.95)
    assert alike.interval == pytest.approx((found.low, found.high))
    assert (alike.effect, alike.seeds, alike.verdict) == (4.0, 3, "holds")
    stored = [{"name": "x", "seed": seed, "returns": some, "made_of": {f"seed-{seed}": f"hash-{seed}"}} for seed, some in values.items()]
    assert by_name(stored)("x") == Row(values, frozenset({"hash-0", "hash-1", "hash-2"}))


@pytest.mark.parametrize("count", [3, 5])
def test_intervals_hold_as_often_as_they_say(count):
    """Of differences of rows whose seeds differ more than their episodes."""
    generator, held = np.random.default_rng(0), 0
    for _ in range(1000):
        rows = [[list(mean + generator.standard_normal(10)) for mean in 5 * generator.standard_normal(count)] for _ in range(2)]
        low, high = difference(*rows)
        held += low < 0 < high
    assert 930 <= held <= 985


def test_intervals_are_welchs():
    one, two = seeds(20, spread=3.0, count=3).per_seed, seeds(10, spread=9.0, count=5).per_seed
    found = ttest_ind([np.mean(each) for each in one], [np.mean(each) for each in two], equal_var=False).confidence_interval(0.95)
    assert difference(one, two) == pytest.approx((found.low, found.high))


@pytest.mark.parametrize(
    ("found", "verdict", "ours"),
    [
        (["holds", "holds"], "reproduced", "holds"),
        (["holds", "unclear"], "inconclusive", "inconclusive"),
        (["unclear", "missing"], "open", "open"),
        (["holds", "too few seeds"], "open", "open"),
        (["missing", "fails"], "not reproduced", "does not hold"),
    ],
)
def test_a_claim(found, verdict, ours):
    values = {
        "holds": (seeds(20), seeds(10)),
        "fails": (seeds(10), seeds(20)),
        "unclear": (seeds(10, spread=50.0), seeds(11, spread=50.0)),
        "missing": (NONE, seeds(10)),
        "too few seeds": (seeds(20, count=1), seeds(10)),
    }
    comparisons = [Comparison("", *values[each]) for each in found]
    assert (Claim("", "", comparisons).verdict, Claim("", "", comparisons, ours=True).verdict) == (verdict, ours)


def test_the_page_is_made_of_what_is_stored():
    assert (ROOT / "docs/results.md").read_text() == page()


def test_a_rival_is_what_keeps_the_limit():
    """FISOR's row always is one, a single skill only if it does, or is missing."""
    costs = {"car_run/gate": seeds(2), "car_run/reward": seeds(40), "car_run/cost": seeds(1), "car_run/feasible": seeds(30)}
    returns = {"car_run/gate": seeds(400), "car_run/reward": seeds(900), "car_run/cost": seeds(100), "car_run/feasible": seeds(300)}

    def found():
        claim = safe_and_above("gate", "car_run", lambda name: costs.get(name, NONE), lambda name: returns.get(name, NONE))
        return claim.verdict, [each.says.rpartition("than ")[2] for each in claim.comparisons]

    assert found() == ("holds", ["10", "one policy weighted as in FISOR", "cost skill alone"])
    costs["car_run/reward"] = seeds(9)
    assert found() == ("does not hold", ["10", "one policy weighted as in FISOR", "reward skill alone", "cost skill alone"])
    del costs["car_run/reward"], returns["car_run/reward"]
    assert found()[0] == "open"


def test_the_limit_is_broken_where_the_papers_rows_break_it():
    costs = {"gate": 4.0, "asec": 30.0, "nsec": 40.0}
    returns = {"gate": 100.0, "asec": 200.0, "nsec": 300.0}

    def row(values):
        return lambda name: seeds(values[name.partition("/")[2]])

    claim = keeps_the_limit("C5", "PSEC", ("gate", "asec", "nsec"), row(costs), row(returns))
    assert claim.verdict == "reproduced"
    says = [each.says for each in claim.comparisons]
    assert "car_circle: ASEC costs more than 10" in says
    assert "car_run: ASEC costs more than 10" not in says
    costs["gate"] = 16.0
    assert keeps_the_limit("C5", "PSEC", ("gate", "asec", "nsec"), row(costs), row(returns)).verdict == "not reproduced"
