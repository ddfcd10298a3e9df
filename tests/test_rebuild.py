"""What was made from a configuration is made again from its card, and the comparison says what differs."""

import sys

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import skillbank as sb
from skillbank import cli, recipe, reproduce
from skillbank.bank import Ref
from tests.test_configs import CONF, SMALL, common


def configured(name, *overrides):
    with initialize_config_dir(str(CONF), version_base=None):
        return OmegaConf.to_container(compose(name, list(overrides)), resolve=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    for name in ("stand", "walk", "run"):
        arrays = {"observations": rng.normal(size=(3, 30, 24)), "actions": rng.uniform(-1, 1, (3, 30, 6)), "rewards": rng.random((3, 30))}
        np.savez(folder / f"{name}.npz", **{key: value.astype(np.float32) for key, value in arrays.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        bank = sb.Bank("bank")
        for make, conf in (
            (recipe.train, configured("train", "task=walker/stand", "fit=base", *SMALL, *common("stand"))),
            (recipe.train, configured("train", "base=walker/stand", "lora.rank=2", *common("walk"))),
            (recipe.train, configured("train", "task=walker/run", "base=walker/stand", "start=[walker/walk]", "lora.rank=2", *common("run"))),
            (recipe.compose, configured("compose", "skills=[walker/walk,walker/run]", "gate=mlp", "name=gated", *common("walk"))),
            (recipe.compose, configured("compose", "skills=[walker/walk,walker/run]", "merge=svd", "merge.rank=1", "name=merged", *common("walk"))),
        ):
            made = make(conf, bank)
            bank.put(made.thing, made.name, card=made.card)
    return folder


@pytest.fixture
def bank(home, monkeypatch):
    monkeypatch.chdir(home)
    return sb.Bank("bank")


@pytest.mark.parametrize("ref", ["walker/stand", "walker/walk", "walker/run", "gated", "merged"])
def test_made_again_it_is_the_same_to_the_last_bit(bank, ref):
    before = [entry.ref for entry in bank.list()]
    found = sb.rebuild(ref, bank)
    assert (found.ref, found.equal, found.changed) == (Ref(ref, 1), True, {})
    assert [entry.ref for entry in bank.list()] == before


def test_newer_versions_of_what_it_was_made_from_do_not_count(bank):
    newer = sb.Base(bank.get("walker/stand").model, {key: value + 1 for key, value in bank.get("walker/stand").tensors.items()})
    ref = bank.put(newer, "walker/stand")
    assert sb.rebuild("walker/walk@1", bank).equal
    bank.remove(ref)


def test_what_differs_is_named(bank):
    """Versions whose cards say another seed, or another rank of the merge, than they were made with."""
    for name in ("walker/walk", "gated", "walker/stand"):
        card = bank.card(name)
        conf = {**card.conf, "seed": 7}
        fields = {"base": card.base["ref"], "parents": card.parents} if name == "walker/walk" else {}
        ref = bank.put(bank.get(name), f"lying/{name}", card={"conf": conf, "data": card.data, **fields})
        found = sb.rebuild(ref, bank)
        assert not found.equal
        assert all(value > 0 for value in found.differences.values())
        assert set(found.differences) & {*bank.get("walker/walk"), *bank.get("gated").tensors, *bank.get("walker/stand").tensors}
        bank.remove(ref)
    card = bank.card("merged")
    ref = bank.put(bank.get("merged"), "lying/merged", card={"conf": card.conf, "metrics": {**card.metrics, "merge_error": 0.25}})
    assert sb.rebuild(ref, bank).differences == {"merge_error": abs(card.metrics["merge_error"] - 0.25)}
    bank.remove(ref)


def test_data_that_changed_since_are_named(bank, home, tmp_path):
    kept = (home / "walk.npz").read_bytes()
    try:
        arrays = dict(np.load(home / "walk.npz"))
        np.savez(home / "walk.npz", **{**arrays, "actions": arrays["actions"] * 0.5})
        found = sb.rebuild("walker/walk", bank)
    finally:
        (home / "walk.npz").write_bytes(kept)
    assert list(found.changed) == ["walk.npz"]
    assert not found.equal


def test_what_has_no_recipe(bank):
    bank.put(sb.Skill({"net.enter": (torch.ones(1, 158), torch.ones(16, 1))}), "by/hand")
    with pytest.raises(ValueError, match=r"the card of .by/hand@1. has no configuration: only what train.py, compose.py and `skillbank merge` made"):
        sb.rebuild("by/hand", bank)
    bank.remove("by/hand")


def test_on_the_command_line(bank, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["skillbank", *arguments, "--bank", "bank"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr().out

    assert run("rebuild", "walker/walk") == (0, "walker/walk@1 is bit-equal\n")
    card = bank.card("walker/walk")
    ref = bank.put(bank.get("walker/walk"), "lying", card={"conf": {**card.conf, "seed": 7}, "data": {"walk.npz": "0" * 64}, "base": "walker/stand"})
    code, out = run("rebuild", "lying")
    assert code == 1
    assert "relative difference" in out
    assert "since it was made, walk.npz has changed: 000000000000 is " in out
    code, out = run("diff", "walker/walk", "lying")
    assert code == 0
    assert [line.split()[-2:] for line in out.splitlines() if "conf seed" in line] == [["0", "7"]]
    assert "enter" not in out
    assert "enter" in run("diff", "walker/walk", "walker/run")[1]
    bank.remove(ref)


def test_parts_that_one_side_lacks_or_has_otherwise_differ():
    stored = {"same": torch.ones(2), "gone": torch.ones(1), "dtype": torch.ones(2), "shape": torch.ones(2), "value": torch.ones(1)}
    made = {"same": torch.ones(2), "new": torch.ones(1), "dtype": torch.ones(2).double(), "shape": torch.ones(2, 1), "value": torch.zeros(1)}
    inf = float("inf")
    assert reproduce._apart(stored, made) == {"gone": inf, "new": inf, "dtype": inf, "shape": inf, "value": 1.0}


def test_distance():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 6, generator=generator), torch.randn(4, 2, generator=generator)
    turn, _ = torch.linalg.qr(torch.randn(2, 2, generator=generator))
    one, same, other = sb.Skill({"x": (a, b)}), sb.Skill({"x": (turn @ a, b @ turn.mT)}), sb.Skill({"x": (a, 2 * b), "y": (a, b)})
    assert sb.distance(one, one) == {"x": 0.0}
    assert 0 < sb.distance(one, same)["x"] < 1e-6
    found = sb.distance(one, other)
    assert found["x"] == pytest.approx(1.0)
    assert found["y"] == float("inf")
    dense = (other.delta("x") - one.delta("x")).norm() / one.delta("x").norm()
    assert found["x"] == pytest.approx(float(dense))
