"""The figures are drawn again the same, and the numbers beside them say what they claim to."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import figures
from benchmarks.figures import Points, Pushed, draw_weights, points, said, save, separation, states
from skillbank import load
from skillbank.tasks.environments import make_environment
from tests.tiny import close

ROOT = Path(__file__).parents[1]
LARGEST = 200_000


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_quick_run_draws_both_figures(tmp_path, monkeypatch, capsys):
    before = figures.RESULTS.stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", ["figures", "--quick", "--out", str(tmp_path)])
    figures.main()
    assert {path.name for path in tmp_path.iterdir()} == {"weights.svg", "levels.svg"}
    for path in tmp_path.iterdir():
        assert path.stat().st_size < LARGEST
        assert "dc:date" not in path.read_text()
    out = capsys.readouterr().out
    for name in ("shipped", "shipped, pushed", "from equal weights, run@1", "hidden layer, six directions", "noise, last step", "action"):
        assert f"| {name} " in out
    assert figures.RESULTS.stat().st_mtime_ns == before


def test_the_page_shows_what_is_stored(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["figures", "--from-results"])
    figures.main()
    page = (ROOT / "docs/walker.md").read_text()
    assert capsys.readouterr().out.strip() in page
    shipped = {f"figures/{path.name}": path for path in (ROOT / "docs/figures").iterdir()}
    assert set(re.findall(r"\]\((figures/[^)]+)\)", page)) == set(shipped)
    assert all(path.stat().st_size < LARGEST for path in shipped.values())


def test_a_figure_is_the_same_file_whenever_it_is_drawn(tmp_path):
    rng = np.random.default_rng(0)
    weights, heights = rng.random((1, 40, 2), np.float32), rng.random((1, 40), np.float32)
    for name in ("one/weights.svg", "two/weights.svg"):
        save(draw_weights({"pushed": figures.Episodes(weights, heights, np.ones(1), np.ones(40))}), tmp_path / name)
    assert (tmp_path / "one/weights.svg").read_bytes() == (tmp_path / "two/weights.svg").read_bytes()


def cloud(values, labels, episodes):
    return Points(values.astype(np.float32), labels, episodes, np.full(len(labels), "stand"))


def test_what_is_apart_is_told_and_what_is_the_same_is_not():
    rng = np.random.default_rng(0)
    values, episodes = rng.standard_normal((60, 4)), np.tile(np.repeat([0, 1, 2], 20), 2)
    labels = np.repeat([0, 1], 60)
    apart = separation(cloud(np.concatenate([values, values + 20]), labels, episodes))
    assert apart["accuracy"] == [1.0] * 3
    assert apart["silhouette"] > 0.8
    same = separation(cloud(np.concatenate([values, values]), labels, episodes))
    assert same["accuracy"] == [0.5] * 3
    assert same["silhouette"] < 0.05


def test_neighbours_are_of_other_episodes():
    """The nearest point of every one is the same state under the other label, then come the same label in other episodes."""
    label, episode, state = (each.ravel() for each in np.indices((2, 3, 5)))
    values = np.stack([0.5 * label, 0.7 * episode, 10.0 * state], 1)
    away = np.linalg.norm(values[:, None] - values, axis=-1) + np.diag(np.full(len(values), np.inf))
    assert (label[away.argmin(1)] != label).all()
    assert separation(cloud(values, label, episode), neighbours=1)["accuracy"] == [1.0] * 3


def test_states_are_of_episodes_that_nothing_was_trained_on():
    at = states(4)
    assert [(at.tasks == task).sum() for task in ("stand", "walk", "run")] == [12] * 3
    with np.load("demos/walker/walk.npz") as file:
        held_out = file["observations"][10:13]
    for row in np.flatnonzero(at.tasks == "walk"):
        assert (held_out[at.episodes[row]] == at.observations[row]).all(1).any()


def test_what_a_policy_says_is_of_one_sampling():
    at = states(2)
    levels, policy = said("walker/walk@1", at.observations), load("walker/walk@1", "adapters")
    torch.manual_seed(0)
    close(torch.from_numpy(levels["action"]), policy.predict({"observation": torch.from_numpy(at.observations)}).flatten(1), 1e-5)
    with torch.no_grad():
        close(policy.net.leave(torch.from_numpy(levels["hidden layer"])), torch.from_numpy(levels["noise"]), 1e-5)
    assert levels["hidden layer"].shape == (18, 256)


def test_the_same_states_tell_nothing_and_own_states_are_of_one_task_each():
    at = states(2)
    all_said = {policy: {"states": at.observations} for policy in figures.POLICIES}
    own = points(figures.CONDITIONS["own states"], "states", at, all_said)
    assert [set(own.tasks[own.labels == label]) for label in range(3)] == [{"stand"}, {"walk"}, {"run"}]
    same = points(figures.CONDITIONS["same states"], "states", at, all_said)
    assert len(same.values) == 3 * len(at.tasks)
    assert separation(same, neighbours=6)["accuracy"] == pytest.approx([1 / 3] * 3, abs=1e-3)


def test_a_push_comes_at_its_step_and_slows_the_walker_down():
    plain, pushed = make_environment("dm_control/walker-run"), Pushed(at=3)
    for _ in range(2):  # an episode begins to count anew
        seen = [env.reset(seed=1)[0] for env in (plain, pushed)]
        for step in range(5):
            assert (seen[0] == seen[1]).all() == (step < 4)
            seen = [env.step(np.zeros(6, np.float32))[0] for env in (plain, pushed)]
        assert seen[1][16] < seen[0][16] - 1
    for env in (plain, pushed):
        env.close()
    assert "benchmarks/WalkerRunPushed-v0" in make_environment("benchmarks/WalkerRunPushed-v0").spec.id
