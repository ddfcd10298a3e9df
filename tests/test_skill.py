import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skillbank import Skill, cosine, gram, stack, truncate
from skillbank.core import orthonormal
from skillbank.skill import core, digest
from tests.tiny import close

SHAPES = {"a": (7, (5,)), "b": (4, (9,)), "c": (6, (3, 2, 2))}


def make(seed, ranks, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for (name, (out, inner)), rank in zip(SHAPES.items(), ranks, strict=True):
        if rank:
            a, b = (
                torch.randn(rank, *inner, generator=generator, dtype=torch.float64),
                torch.randn(out, rank, generator=generator, dtype=torch.float64),
            )
            factors[name] = (a.to(dtype), b.to(dtype))
    return Skill(factors)


def dense(skill, name):
    out, inner = SHAPES[name]
    return skill.delta(name).double() if name in skill else torch.zeros(out, *inner, dtype=torch.float64)


def flat(skill):
    return torch.cat([dense(skill, name).flatten() for name in SHAPES])


skills = st.builds(make, st.integers(0, 10**6), st.tuples(st.integers(1, 6), st.integers(0, 9), st.integers(0, 3)))
weights = st.floats(-3, 3, allow_nan=False)


@given(st.lists(st.tuples(skills, weights), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_stack_is_the_sum_of_deltas(pairs):
    parts, values = [skill for skill, _ in pairs], [weight for _, weight in pairs]
    close(flat(stack(parts, values)), sum(w * flat(s) for s, w in pairs), 1e-12)


@given(skills, st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_truncation_is_the_best_of_its_rank(skill, rank):
    short = truncate(skill, rank=rank)
    for name in skill:
        u, s, vh = torch.linalg.svd(dense(skill, name).flatten(1))
        best = (u[:, :rank] * torch.cat([s, s.new_zeros(99)])[: min(rank, u.shape[1])])[:, : len(vh)] @ vh[: min(rank, u.shape[1])]
        close(dense(short, name).flatten(1), best, 1e-10)
        assert short.ranks[name] <= rank


@given(skills, st.floats(0, 0.95))
@settings(max_examples=60, deadline=None)
def test_truncation_to_an_error_stays_within_it(skill, error):
    short = truncate(skill, error=error)
    assert float((flat(short) - flat(skill)).norm()) <= error * float(flat(skill).norm()) * (1 + 1e-9) + 1e-12


def test_truncation_to_an_error_gives_rank_to_the_module_with_the_energy():
    skill = make(0, (4, 4, 3)).scaled({"a": 100.0})
    assert truncate(skill, error=0.5).ranks["a"] >= 1
    ranks = truncate(skill, error=0.05).ranks
    assert ranks["b"] == ranks["c"] == 1
    assert ranks["a"] > 1


@given(st.lists(skills, min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_gram_and_cosine_equal_the_dense_ones(parts):
    rows = torch.stack([flat(skill) for skill in parts])
    close(gram(parts), rows @ rows.mT, 1e-11)
    unit = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(cosine(parts), (unit @ unit.mT).clamp(-1, 1), rtol=0, atol=1e-10)
    assert parts[0].norm() == pytest.approx(float(rows[0].norm()))


@given(skills, st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_another_gauge_is_the_same_function_everywhere(skill, seed):
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, (a, b) in skill.factors.items():
        q = torch.linalg.qr(torch.randn(len(a), len(a), generator=generator, dtype=torch.float64))[0] * 3
        factors[name] = ((torch.linalg.inv(q) @ a.flatten(1)).reshape(a.shape), b @ q)
    other = Skill(factors)
    close(flat(other), flat(skill), 1e-10)
    close(flat(truncate(other, rank=1)), flat(truncate(skill, rank=1)), 1e-9)
    close(cosine([skill, other]), torch.ones(2, 2, dtype=torch.float64), 1e-10)
    assert other.fingerprint != skill.fingerprint


def test_the_core_is_exact():
    parts = [make(1, (3, 2, 1)), make(2, (5, 0, 2))]
    each = core(parts, "a")
    for k, skill in enumerate(parts):
        close(each.left @ each.cores[k] @ each.right.mT, dense(skill, "a"), 1e-13)


def test_ranks_beyond_the_layer_are_fine():
    skill = make(3, (9, 9, 3))
    close(flat(truncate(skill, rank=50)), flat(skill), 1e-12)
    assert truncate(skill, rank=50).ranks == {"a": 5, "b": 4, "c": 3}


def test_a_zero_skill_has_cosine_zero():
    skill = make(0, (2, 2, 2))
    assert cosine([skill, skill.scaled(0.0)]).tolist() == [[pytest.approx(1), 0], [0, 0]]


def test_a_skill_is_frozen_and_keeps_no_gradient():
    a, b = torch.ones(2, 3, requires_grad=True), torch.ones(4, 2)
    skill = Skill({"x": (a, b)})
    assert not skill["x"][0].requires_grad
    with pytest.raises(TypeError, match="does not support item assignment"):
        skill.factors["x"] = (a, b)  # type: ignore[index]
    with pytest.raises(AttributeError, match="cannot assign to field"):
        skill.factors = {}  # type: ignore[misc]


def test_scaling_per_module():
    skill = make(0, (2, 2, 0))
    scaled = skill.scaled({"a": -2.0})
    close(dense(scaled, "a"), -2 * dense(skill, "a"), 1e-14)
    assert torch.equal(scaled.delta("b"), skill.delta("b"))


def test_dtypes_are_promoted_and_kept():
    low, high = make(0, (2, 2, 2), torch.bfloat16), make(1, (2, 2, 2), torch.float32)
    assert stack([low, low])["a"][0].dtype == torch.bfloat16
    assert stack([low, high], [0.5, 0.25])["a"][0].dtype == torch.float32
    assert truncate(low, rank=1)["a"][0].dtype == torch.bfloat16
    assert low.to(dtype=torch.float64)["a"][0].dtype == torch.float64


def test_the_digest_sees_names_dtypes_shapes_and_bytes():
    x = torch.arange(6.0)
    prints = [digest(t) for t in ({"x": x}, {"y": x}, {"x": x.reshape(2, 3)}, {"x": x.double()}, {"x": x + 1}, {"x": x.bfloat16()})]
    assert len(set(prints)) == len(prints)
    assert digest({"x": x, "y": x + 1}) == digest({"y": x + 1, "x": x})


def test_repr_says_what_it_is():
    assert repr(make(0, (2, 5, 0))) == "Skill(2 modules, rank 2-5, 89 parameters)"


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({}, "at least one module"),
        ({"x": (torch.ones(2, 3), torch.ones(4, 3))}, r"factor 'x': A must be \(R, I\) and B \(O, R\), got A \(2, 3\) and B \(4, 3\)"),
        ({"x": (torch.ones(3), torch.ones(4, 3))}, "factor 'x'"),
        ({"x": (torch.ones(0, 3), torch.ones(4, 0))}, r"factor 'x' is empty, A is \(0, 3\) and B \(4, 0\): leave the module out"),
        ({"x": (torch.ones(2, 3).long(), torch.ones(4, 2))}, "floating point, got A torch.int64"),
        ({"x": (torch.full((2, 3), float("nan")), torch.ones(4, 2))}, "'x' holds NaN"),
    ],
)
def test_bad_factors(factors, message):
    with pytest.raises(ValueError, match=message):
        Skill(factors)


def test_bad_arguments():
    skill = make(0, (2, 2, 0))
    with pytest.raises(KeyError, match="no module 'z'; it has"):
        skill["z"]
    with pytest.raises(ValueError, match=r"embeddings name modules that the skill does not have: \['z'\]"):
        Skill(dict(skill.factors), frozenset({"z"}))
    with pytest.raises(ValueError, match=r"weights name modules that the skill does not have: \['z'\]"):
        skill.scaled({"z": 1.0})
    with pytest.raises(ValueError, match="got none"):
        stack([])
    with pytest.raises(ValueError, match="3 weights for 2 skills"):
        stack([skill, skill], [1, 2, 3])
    with pytest.raises(ValueError, match=r"a rank, an error or a budget, got rank=1, error=0\.1"):
        truncate(skill, rank=1, error=0.1)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        truncate(skill, rank=0)
    with pytest.raises(ValueError, match=r"in \[0, 1\), got 1"):
        truncate(skill, error=1.0)
    with pytest.raises(ValueError, match="module 'a' has another size"):
        stack([skill, Skill({"a": (torch.ones(2, 8), torch.ones(7, 2))})])
    with pytest.raises(KeyError, match="none of the 1 skills has module 'c'"):
        core([skill], "c")


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 12), st.sampled_from([0.0, 1e-12, 1e-8, 1e-5, 1e-2]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_thin_qr_is_exact_however_dependent_the_columns_are(seed, rows, columns, apart, zero):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    matrix = matrix[:, :1] + apart * matrix  # ever closer to one direction
    matrix[:, 0] *= 1e6
    if zero:
        matrix[:, -1] = 0
    q, r = orthonormal(matrix)
    assert q.shape == (rows, min(rows, columns))
    torch.testing.assert_close(q.mT @ q, torch.eye(q.shape[1], dtype=torch.float64), rtol=0, atol=1e-12)
    assert ((q @ r - matrix).norm(dim=0) <= 1e-12 * matrix.norm(dim=0)).all()
