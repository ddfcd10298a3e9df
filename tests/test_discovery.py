"""Skills found in demonstrations that nobody has cut up: boundaries, kinds, scores, and from the command line to the bank."""

import dataclasses
import itertools
import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import skillbank as sb
from benchmarks.discovery import concatenation, held_out
from skillbank import cli
from skillbank.discovery import boundaries, boundary_scores, cluster, discover, errors, purity, segments, train_discovered
from skillbank.models.diffusion import DiffusionPolicy
from skillbank.tasks.demonstrations import Demonstrations, load_demonstrations
from tests.commands import ROOT
from tests.tiny import tiny_policy

LEVELS = [1.0, 3.0, 0.5, 2.0]


def steps(lengths, noise=0.0, period=0, seed=0):
    """A signal of constant pieces, with noise and a cycle on top."""
    signal = np.repeat(np.resize(LEVELS, len(lengths)), lengths)
    cycle = np.sin(2 * np.pi * np.arange(len(signal)) / period) if period else 0.0
    return signal + cycle + noise * np.random.default_rng(seed).standard_normal(len(signal))


def demonstrations(lengths=(90, 120), seed=0):
    """Episodes for the tiny policy."""
    generator = np.random.default_rng(seed)
    total = sum(lengths)
    arrays = generator.standard_normal((total, 5)), generator.uniform(-1, 1, (total, 3)), np.zeros(total)
    return Demonstrations(*arrays, np.cumsum([0, *lengths]), f"tiny {seed}")


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(130, 250), min_size=1, max_size=4), st.lists(st.integers(130, 250), min_size=1, max_size=4))
def test_constant_pieces_are_found_to_the_row(one, two):
    signal, starts = np.concatenate([steps(one), steps(two)]), [0, sum(one), sum(one) + sum(two)]
    true = [*np.cumsum(one)[:-1], *(sum(one) + np.cumsum(two)[:-1])]
    assert boundaries(signal, starts, minimum=20).tolist() == true
    shuffled = np.stack([signal, 5 - 2 * signal], 1)
    assert boundaries(shuffled, starts, minimum=20).tolist() == true


def best_partition(x, minimum, penalty):
    """Least cost of all partitions, one by one."""
    n = len(x)

    def cost(cuts):
        return sum(((x[a:b] - x[a:b].mean(0)) ** 2).sum() + penalty for a, b in itertools.pairwise((0, *cuts, n)))

    every = (cuts for count in range(n // minimum) for cuts in itertools.combinations(range(minimum, n - minimum + 1), count))
    return min((cuts for cuts in every if min(np.diff((0, *cuts, n))) >= minimum), key=cost)


@pytest.mark.parametrize("seed", range(6))
def test_the_partition_is_the_best_of_all(seed):
    from skillbank.discovery import _partition

    x = np.random.default_rng(seed).standard_normal((18, 2)).cumsum(0)
    for minimum, strength in ((3, 0.1), (4, 0.5), (3, 1.0)):
        assert _partition(x, minimum, strength) == list(best_partition(x, minimum, strength * 3 * np.log(18)))


def test_a_cycle_is_no_boundary_and_a_change_of_its_mean_is_one():
    lengths = [300, 250, 350, 200]
    assert boundaries(steps([1100], 0.3, period=17), [0, 1100]).tolist() == []
    found = boundaries(steps(lengths, 0.3, period=17), [0, 1100])
    assert boundary_scores(found, np.cumsum(lengths)[:-1], tolerance=10)["f1"] == 1


def test_neither_the_units_nor_further_episodes_matter():
    signal = steps([200, 150, 250], 0.4)
    found = boundaries(signal, [0, 600])
    assert len(found) == 2
    assert boundaries(7 - 1000 * signal, [0, 600]).tolist() == found.tolist()
    twice = boundaries(np.concatenate([signal, signal]), [0, 600, 1200])
    assert twice.tolist() == [*found, *(600 + found)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 100))
def test_segments_partition_every_episode(lengths, seed):
    starts = np.cumsum([0, *lengths])
    cuts = np.random.default_rng(seed).integers(0, starts[-1], 4)
    found = segments(starts, cuts)
    rows = np.concatenate([starts[each.episode] + np.arange(each.first, each.last + 1) for each in found])
    assert rows.tolist() == list(range(starts[-1]))
    assert all(0 <= each.first <= each.last < lengths[each.episode] for each in found)
    assert sum(map(len, found)) == starts[-1]


def test_scores_on_numbers_made_by_hand():
    assert boundary_scores([100, 205, 400], [110, 200, 300, 500]) == pytest.approx({"f1": 4 / 7, "precision": 2 / 3, "recall": 1 / 2})
    assert boundary_scores([90, 110], [100]) == pytest.approx({"f1": 2 / 3, "precision": 1 / 2, "recall": 1})
    assert boundary_scores([], [100]) == {"f1": 0, "precision": 0, "recall": 0}
    assert boundary_scores([], []) == {"f1": 1, "precision": 1, "recall": 1}
    assert purity([0, 0, 0, 1, 1, 1], list("aabbbc")) == pytest.approx(4 / 6)
    assert purity([2, 2, 5, 5], list("bbaa")) == 1


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=30), st.permutations(range(5)), st.randoms())
def test_names_and_order_do_not_matter_to_scores(pairs, names, random):
    labels, true = zip(*pairs, strict=True)
    assert purity([names[label] for label in labels], true) == purity(labels, true)
    assert purity(true, true) == 1
    found, cuts = [7 * label for label in labels], [9 * each for each in true]
    before = boundary_scores(found, cuts, 3)
    random.shuffle(found), random.shuffle(cuts)
    assert boundary_scores(found, cuts, 3) == before


def test_groups_are_told_apart_and_counted():
    generator = np.random.default_rng(0)
    true = np.repeat([0, 1, 2, 3], [5, 9, 4, 7])
    values = 10 * generator.standard_normal((4, 6))[true] + generator.standard_normal((25, 6))
    assert cluster(values, 4).tolist() == true.tolist()
    assert cluster(values).tolist() == true.tolist()
    assert set(cluster(generator.standard_normal((40, 30)))) == {0}
    assert cluster(values[:1]).tolist() == [0]
    assert sorted(cluster(values[:3], 3)) == [0, 1, 2]


def test_errors_are_the_losses_of_every_step_and_come_again():
    policy, data = tiny_policy(), demonstrations()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = errors(policy, data, draws=3, size=64)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.shape == (210,)
    assert found.mean() == pytest.approx(1)
    assert found.tolist() == errors(policy, data, draws=3, size=64).tolist()
    batch = {"observation": torch.from_numpy(data.observations[:64]), "action": torch.from_numpy(data.actions[:64, None])}
    torch.manual_seed(0)
    t, noise = torch.randint(5, (64,))[:1].expand(64), torch.randn(64, 3)[:1].expand(64, 3)
    by_hand = (policy.net(policy.noised(batch["action"].flatten(1), noise, t), batch["observation"], t) - noise).square().sum(-1)
    ratio = errors(policy, data, draws=1, size=64)[:64] / by_hand.detach().double().numpy()
    assert ratio == pytest.approx(np.full(64, ratio[0]), rel=1e-5)


def test_costs_go_along(tmp_path):
    data = demonstrations((90, 120))
    data = dataclasses.replace(data, costs=np.arange(210))
    (found,) = discover(data, [tiny_policy()], skills=1, draws=1)
    found.save(tmp_path / "0.npz")
    assert load_demonstrations(str(tmp_path / "0.npz")).costs.tolist() == list(range(210))


def test_longer_action_chunks_have_errors_too():
    assert np.isfinite(errors(tiny_policy(horizon=4), demonstrations(), draws=2, size=64)).all()


def test_what_cannot_be():
    wide = DiffusionPolicy(7, 3, width=16, blocks=1, time_dim=8, time_hidden=(8, 8))
    with pytest.raises(ValueError, match=r"tiny 0 does not go with this DiffusionPolicy: .*\(B, 7\), got \(1, 5\): give a base of its sizes"):
        errors(wide, demonstrations())
    with pytest.raises(ValueError, match=r"errors need a model with losses.*got Linear with losses: False"):
        errors(torch.nn.Linear(2, 2), demonstrations())
    with pytest.raises(ValueError, match="episode 1 has 30 steps, a segment at least 60: leave it out, or lower minimum"):
        discover(demonstrations((80, 30)), [tiny_policy()])
    with pytest.raises(ValueError, match="5 skills cannot be told from 2 segments: ask for 1 to 2"):
        discover(demonstrations((60, 60)), [tiny_policy()], skills=5)
    with pytest.raises(ValueError, match="a signal of 3 rows that are finite is needed, got 3, 2 of them finite"):
        boundaries([1.0, np.nan, 2.0], [0, 3], minimum=1)
    with pytest.raises(ValueError, match="minimum must be at least 1 and strength at least 0, got minimum=0"):
        boundaries([1.0], [0, 1], minimum=0)


@pytest.fixture(scope="module")
def walker():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        made = concatenation(held_out("stochastic"), 0, episodes=1)
        alone = concatenation({"run": held_out("stochastic")["run"]}, 0, episodes=1)
        return sb.load("walker/stand", sb.Bank(ROOT / "adapters")), made, alone


def test_stand_walk_and_run_are_told_apart_by_the_base_alone(walker):
    base, made, alone = walker
    found = discover(made.demonstrations, [base], draws=8)
    where = [each.first for kind in found for each in kind.segments if each.first]
    assert boundary_scores(where, made.cuts)["f1"] >= 0.8
    labels = np.empty(len(made.tasks), int)
    for number, kind in enumerate(found):
        for each in kind.segments:
            labels[each.first : each.last + 1] = number
    assert purity(labels, made.tasks) >= 0.9
    assert sum(len(kind.demonstrations.rewards) for kind in found) == len(made.tasks)
    cuts = boundaries(errors(base, alone.demonstrations, draws=8), alone.demonstrations.starts)
    assert boundary_scores(cuts, alone.cuts)["recall"] <= 0.2, "a jump of the state alone is no boundary"


def save(data, path):
    ends = np.isin(np.arange(len(data.rewards)), data.starts[1:] - 1)
    np.savez(path, observations=data.observations, actions=data.actions, rewards=data.rewards, timeouts=ends)


def test_from_the_command_line_to_skills_in_the_bank(walker, tmp_path, monkeypatch, capsys):
    _, made, _ = walker
    monkeypatch.chdir(tmp_path)
    save(made.demonstrations, "long.npz")
    bank = sb.Bank("bank")
    bank.pull(str(ROOT / "adapters"), "walker/stand")
    line = ["skillbank", "discover", "long.npz", "--base", "walker/stand", "-o", "found", "--skills", "3", "--bank", "bank"]
    monkeypatch.setattr(sys, "argv", [*line, "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    assert [each["path"] for each in shown] == ["found/0.npz", "found/1.npz", "found/2.npz"]
    source = load_demonstrations("long.npz")
    for each in shown:
        assert (each["source"], each["hash"]) == ("long.npz", source.hash)
        piece, stored = load_demonstrations(each["path"]), np.load(each["path"])
        assert stored["segments"].tolist() == [[s["episode"], s["first"], s["last"]] for s in each["segments"]]
        rows = np.concatenate([np.arange(s["first"], s["last"] + 1) for s in each["segments"]])
        assert np.array_equal(piece.observations, source.observations[rows])
        assert piece.lengths.tolist() == [s["last"] + 1 - s["first"] for s in each["segments"]]
    monkeypatch.setattr(sys, "argv", [*line[:-3], "99", *line[-2:]])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert (stop.value.code, capsys.readouterr().err.startswith("skillbank: 99 skills cannot be told from")) == (1, True)


def test_a_skill_for_each_kind_with_its_lineage(walker, tmp_path, monkeypatch):
    base, made, _ = walker
    monkeypatch.chdir(tmp_path)
    shipped, bank = sb.Bank(ROOT / "adapters"), sb.Bank("bank")
    bank.pull(str(ROOT / "adapters"), "walker/stand")
    like = shipped.card("walker/walk").conf
    quick = {"task": {k: v for k, v in like["task"].items() if k not in ("rehearsal", "balance")}, "lora": {**like["lora"], "rank": 2}}
    conf = {**like, **quick, "fit": {**like["fit"], "steps": 2, "compile": False}, "batch_size": 8, "logger": {}}
    found = discover(made.demonstrations, [base], draws=4, skills=3)
    refs = train_discovered(found, conf, bank, name="walker/found", folder="found")
    assert [str(ref) for ref in refs] == ["walker/found-0@1", "walker/found-1@1", "walker/found-2@1"]
    for number, (ref, each) in enumerate(zip(refs, found, strict=True)):
        card = bank.card(ref)
        assert card.conf["discovered"] == each.lineage
        assert card.conf["discovered"]["hash"] == made.demonstrations.hash
        assert card.data == {f"found/{number}.npz": load_demonstrations(f"found/{number}.npz").hash}
        assert card.base_name == "walker/stand@1"
    assert sb.rebuild(refs[0], bank).equal
