import sys

import pytest
import torch
from torch.testing import assert_close

import skillbank as sb
from skillbank import cli
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


def test_duplicates_are_the_same_function_on_the_same_base(bank):
    assert [[str(ref) for ref in group] for group in sb.duplicates(bank)] == [["one-turned@1", "one@1"]]


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
    assert (code, out.split()[4:7]) == (0, ["one-turned@1", "1.000", "1"])
    assert "far@1" not in out
    assert '"ref": "one-turned@1"' in run("similar", "one", "--json")[1]
    assert run("dedup") == (0, "one-turned@1 one@1\n1 groups\n")
