import json
import sys

import pytest
import torch
from torch.testing import assert_close

import skillbank as sb
from skillbank import cli
from skillbank.search import overlap
from tests.test_bank import base_of, skill_of

TURN = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(1)))[0] * 3


def turned(skill):
    """The same function in another gauge."""
    return sb.Skill({name: (torch.linalg.solve(TURN, a), b @ TURN) for name, (a, b) in skill.factors.items()})


def dense(skill):
    return torch.cat([skill.delta(name).double().flatten() for name in ("a", "b.0")])


@pytest.fixture
def bank(tmp_path):
    bank = sb.Bank(tmp_path / "bank")
    bank.put(base_of(), "base")
    near = sb.stack([skill_of(1), skill_of(2)], weights=[1.0, 0.2])
    things = {
        "one": skill_of(1),
        "one-turned": turned(skill_of(1)),
        "near": near,
        "far": skill_of(3),
        "minus": sb.stack([skill_of(1)], weights=[-2.0]),
    }
    for name, thing in things.items():
        bank.put(thing, name, card={"base": "base"})
    bank.put(skill_of(1), "foreign", card={"base": {"name": "gpt2"}})
    return bank


def test_similar_is_the_cosine_of_dense_deltas(bank):
    found = sb.similar(bank, "one")
    assert [each.ref.name for each in found] == ["one-turned", "near", "far", "minus"]
    one = dense(skill_of(1))
    for each in found:
        other = dense(bank.get(each.ref))
        assert_close(
            torch.tensor([each.cosine, each.size], dtype=torch.float64),
            torch.stack([one @ other / one.norm() / other.norm(), other.norm() / one.norm()]),
        )
    assert sb.similar(bank, "one", top=1) == found[:1]


def dense_overlap(one, two):
    """The same from the dense deltas, by SVDs of whole matrices and angles between their singular vectors."""
    one, two = one.to(dtype=torch.float64), two.to(dtype=torch.float64)
    total, shared = 0.0, [0.0, 0.0]
    for name in one:
        mine = one.delta(name).flatten(1)
        total += float(mine.square().sum())
        if name not in two:
            continue
        theirs = two.delta(name).flatten(1)
        for side, (a, b) in enumerate([(mine, theirs), (mine.mT, theirs.mT)]):
            bases = [torch.linalg.svd(each)[0][:, : torch.linalg.matrix_rank(each, rtol=1e-6)] for each in (a, b)]
            angles = torch.linalg.svdvals(bases[0].mT @ bases[1]).clamp(max=1).acos()
            shared[side] += float(mine.square().sum()) * float(angles.cos().square().mean())
    return shared[0] / total, shared[1] / total


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def many(seed, ranks, modules=("a", "b", "conv")):
    shapes = {"a": ((9,), 7), "b": ((5,), 11), "conv": ((3, 2, 2), 8)}
    factors = {}
    for i, (name, rank) in enumerate(zip(modules, ranks, strict=True)):
        into, out = shapes[name]
        factors[name] = (random(rank, *into, seed=seed + i), random(out, rank, seed=seed + 50 + i))
    return sb.Skill(factors)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (many(1, (2, 3, 4)), many(2, (4, 1, 3))),
        (many(1, (2, 3, 4)), many(2, (4, 1), ("a", "conv"))),
        (many(1, (2,), ("b",)), many(2, (4, 1, 2))),
        (sb.stack([many(1, (2, 2, 2)), many(1, (2, 2, 2))]), many(5, (3, 3, 3))),
    ],
    ids=["ranks", "a module less", "modules more", "rank lower than stored"],
)
def test_overlap_is_that_of_dense_deltas(one, two):
    assert overlap(one, two) == pytest.approx(dense_overlap(one, two), abs=1e-9)


def test_what_overlap_tells():
    skill, zero = many(1, (2, 3, 4)), many(1, (2, 3, 4)).scaled(0.0)
    assert overlap(skill, skill.scaled(-3.0)) == pytest.approx((1, 1))
    assert overlap(skill, sb.stack([skill, many(9, (1, 1, 1))])) == pytest.approx((1, 1)), "a space inside another"
    assert overlap(skill, zero) == overlap(zero, skill) == overlap(zero, zero) == (0.0, 0.0)
    assert overlap(many(1, (2,), ("a",)), many(1, (2,), ("b",))) == (0.0, 0.0)
    eye = torch.eye(4)
    one = sb.Skill({"a": (eye[:2], eye[:, :2])})
    assert overlap(one, sb.Skill({"a": (eye[:2], eye[:, 2:])})) == pytest.approx((0, 1)), "the same inputs, other outputs"
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    half = sb.Skill({"a": (torch.cat([turn[:, :1].mT @ eye[[0, 2]], eye[1:2]]), eye[:, :2])})
    assert overlap(one, half) == pytest.approx((1, (0.36 + 1) / 2)), "angles of 0 and of acos(0.6)"


def test_duplicates_are_the_same_function_on_the_same_base(bank):
    bank.put(skill_of(1).scaled(-1.0), "one-not", card={"base": "base"})  # of the same norm
    bank.put(skill_of(1).scaled(1.005), "one-nearly", card={"base": "base"})
    assert [[str(ref) for ref in group] for group in sb.duplicates(bank)] == [["one-turned@1", "one@1"]]
    assert [[str(ref) for ref in group] for group in sb.duplicates(bank, tolerance=0.01)] == [["one-nearly@1", "one-turned@1", "one@1"]]


def test_only_skills_are_compared(bank):
    with pytest.raises(ValueError, match="'base@1' is a base: only skills are compared"):
        sb.similar(bank, "base")


def test_on_the_command_line(bank, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["skillbank", *arguments, "--bank", str(bank.root)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr().out

    code, out = run("similar", "one", "--top", "2")
    assert (code, out.split()[:5]) == (0, ["ref", "cosine", "size", "columns", "rows"])
    assert out.split()[6:11] == ["one-turned@1", "1.000", "1", "1.000", "1.000"]
    assert "far@1" not in out
    first = json.loads(run("similar", "one", "--json")[1])[0]
    assert (first["ref"], first["columns"], first["rows"]) == ("one-turned@1", pytest.approx(1), pytest.approx(1))
    assert run("dedup") == (0, "one-turned@1 one@1\n1 groups\n")
