"""The control task: batches as functions of the step, chunks, held-out episodes, evaluation."""

import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from skillbank.tasks.control import ControlTask, summary
from skillbank.tasks.demonstrations import load_demonstrations

WALK = "dm_control/walker-walk"
ROOT = Path(__file__).parents[1]
LENGTHS = (4, 1, 7, 3)


def arrays(features=24, actions=6, lengths=LENGTHS):
    """Every entry of a row is its number, so that an example says where it comes from."""
    steps = sum(lengths)
    number = np.arange(steps, dtype=np.float32)
    timeouts = np.zeros(steps, bool)
    timeouts[np.cumsum(lengths) - 1] = True
    return {
        "observations": np.repeat(number[:, None], features, 1),
        "actions": np.repeat(number[:, None] / steps, actions, 1),
        "rewards": np.ones(steps, np.float32),
        "timeouts": timeouts,
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("demos") / "a.npz"
    np.savez(path, **arrays())
    return str(path)


@pytest.fixture(scope="module")
def make(path):
    def make(**options):
        return ControlTask(**{"name": "walker/walk", "demonstrations": path, "environment": WALK, **options})

    return make


class Still(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)

    def forward(self, batch):
        return self.net.weight.sum()

    def context(self, batch):
        return batch["observation"]

    def predict(self, batch):
        return torch.zeros(len(batch["observation"]), 1, 6)


def rows_of(batch):
    return batch["observation"][:, 0].long()


@settings(deadline=None)
@given(start=st.integers(0, 10**9), skip=st.integers(0, 5), seed=st.integers(0, 2**63), horizon=st.integers(1, 4), size=st.integers(1, 9))
def test_a_batch_depends_on_seed_and_step_alone(make, start, skip, seed, horizon, size):
    batches = make(horizon=horizon).batches(batch_size=size, seed=seed)
    one, two = next(islice(batches(start), skip, None)), next(batches(start + skip))
    assert one.keys() == two.keys() == {"observation", "action"}
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["observation"].shape == (size, 24)
    assert one["action"].shape == (size, horizon, 6)


@settings(deadline=None)
@given(horizon=st.integers(1, 9), seed=st.integers(0, 99))
def test_chunks_never_cross_the_end_of_an_episode(make, horizon, seed):
    batch = next(make(horizon=horizon).batches(batch_size=64, seed=seed)(0))
    rows = rows_of(batch)
    ends = torch.tensor(LENGTHS).cumsum(0)
    last = ends[torch.bucketize(rows, ends, right=True)] - 1
    expected = torch.minimum(rows[:, None] + torch.arange(horizon), last[:, None]) / sum(LENGTHS)
    torch.testing.assert_close(batch["action"], expected[..., None].expand(-1, -1, 6))


def test_sampling_is_uniform_over_the_training_steps_only(make):
    task = make(episodes=3, held_out=1)
    rows = torch.cat([rows_of(batch) for batch in islice(task.batches(batch_size=500, seed=1)(0), 24)])
    counts = torch.bincount(rows, minlength=sum(LENGTHS))
    assert counts[12:].sum() == 0
    assert ((counts[:12] - 1000).abs() < 150).all()


def test_other_seeds_and_steps_give_other_batches(make):
    task = make()
    drawn = [rows_of(next(task.batches(batch_size=32, seed=seed)(step))).tolist() for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(rows) for rows in drawn}) == 4


def test_validation_is_the_held_out_part_in_order(make):
    task = make(episodes=2, held_out=2, horizon=2)
    batches = list(task.validation(batch_size=4))
    assert torch.cat([rows_of(batch) for batch in batches]).tolist() == list(range(5, 15))
    assert [len(batch["action"]) for batch in batches] == [4, 4, 2]
    assert (len(task.demonstrations), len(task.held_out)) == (2, 2)
    rest = make(held_out=1)
    assert (rest.demonstrations.lengths.tolist(), rest.held_out.lengths.tolist()) == ([4, 1, 7], [3])


def test_held_out_episodes_do_not_change_what_is_trained_on(make):
    assert make(episodes=2, held_out=2).data == make(episodes=2).data != make(episodes=3).data


def test_observation_noise_has_the_stated_size_and_leaves_actions_alone(make):
    plain, noisy = make(), make(observation_noise=0.5)
    one, two = (next(noisy.batches(batch_size=4000, seed=3)(11)) for _ in range(2))
    clean = next(plain.batches(batch_size=4000, seed=3)(11))
    assert torch.equal(one["observation"], two["observation"])
    assert torch.equal(one["action"], clean["action"])
    deviation = (one["observation"] - clean["observation"]).std(0)
    expected = 0.5 / 3**0.5 * torch.from_numpy(noisy.demonstrations.observations.std(0))
    torch.testing.assert_close(deviation, expected, rtol=0.1, atol=0)


def test_half_of_the_examples_are_seen_in_the_mirror(make):
    order = {"observation": [1, 0, *range(2, 24)], "action": [5, 4, 3, 2, 1, 0]}
    task = make(mirror=order)
    task.demonstrations.observations[:, 0] += 1000
    task.demonstrations.actions[:, 0] = -1
    batch = next(task.batches(batch_size=2000, seed=0)(0))
    flipped = batch["observation"][:, 1] > 900
    assert 0.45 < flipped.float().mean() < 0.55
    assert torch.equal(flipped, batch["observation"][:, 0] < 900)
    assert torch.equal(flipped, batch["action"][:, 0, 5] == -1)
    assert torch.equal(~flipped, batch["action"][:, 0, 0] == -1)


def test_balance_draws_rare_steps_more_often(tmp_path):
    path, rare = str(tmp_path / "rare.npz"), 20
    data = arrays(lengths=(500,))
    data["observations"] = np.random.default_rng(0).normal(size=(500, 24)).astype(np.float32) * 0.01
    data["observations"][:rare] *= 1000
    np.savez(path, **data)
    shares = {}
    for power in (0.0, 1.0, 2.0):
        task = ControlTask(name="x", demonstrations=path, environment=WALK, balance=power)
        batch = next(task.batches(batch_size=20_000, seed=0)(0))
        shares[power] = float((batch["observation"].abs().amax(1) > 1).float().mean())
    expected = [rare * 10**power / (rare * 10**power + 480) for power in shares]
    assert list(shares.values()) == pytest.approx(expected, abs=0.02)


def test_rehearsal_takes_its_share_and_only_the_steps_below_the_reward(make, tmp_path):
    old = arrays()
    old["observations"] += 100
    old["rewards"] = np.arange(sum(LENGTHS), dtype=np.float32)
    np.savez(tmp_path / "old.npz", **old)
    source = str(tmp_path / "old.npz")
    task = make(episodes=1, horizon=2, rehearsal={"demonstrations": source, "share": 0.25, "reward_below": 5.0, "episodes": 3})
    batch = next(task.batches(batch_size=400, seed=0)(0))
    rows = rows_of(batch)
    assert set(rows[:300].tolist()) == set(range(4))
    assert set(rows[300:].tolist()) == {100, 101, 102, 103, 104}
    number, steps = rows[300:] - 100, sum(LENGTHS)
    torch.testing.assert_close(batch["action"][300:, 0, 0], number / steps)
    following = torch.tensor([1, 2, 3, 3, 4])[number]  # the first episode has 4 steps, the second 1: its last action is repeated
    torch.testing.assert_close(batch["action"][300:, 1, 0], following / steps)
    assert task.data == {task.demonstrations.source: task.demonstrations.hash, source: load_demonstrations(source, episodes=3).hash}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.0}, r"share is the part of a batch, in \(0, 1\), got 1.0"),
        ({"share": 0.5, "reward_below": 0.5}, "has a reward below 0.5, the least is 1"),
        ({"share": 0.5, "demonstrations": "small.npz"}, r"small.npz has \(3, 6\) features and actions, .* has \(24, 6\): use one embodiment"),
    ],
)
def test_bad_rehearsal(make, path, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    np.savez("small.npz", **arrays(features=3))
    with pytest.raises(ValueError, match=message):
        make(rehearsal={"demonstrations": path, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"observation_noise": -1.0}, "observation_noise=-1.0"),
        ({"mirror": {"observation": [0], "action": list(range(6))}}, r"mirror.observation must be a permutation of 0..23, got \[0\]"),
        ({"mirror": {"observation": list(range(24))}}, r"mirror.action must be a permutation of 0..5, got \[\]"),
    ],
)
def test_bad_augmentation(make, path, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_evaluation_episodes(make):
    task = make(max_steps=3, evaluation_episodes=2)
    assert task.environment_seeds() == [0, 1]
    assert task.environment_seeds(20, 3) == [20_000, 20_001, 20_002]
    assert make(seed=21).environment_seeds(1, 1) == [22_000]
    metrics = task.evaluate(Still())
    assert metrics == task.evaluate(Still(), seed=0)
    rollout = task.rollout(Still(), seed=0, record=1, frame_every=0)
    assert metrics == summary(rollout.returns)
    assert rollout.recording.observations.shape == (3, 24)
    assert metrics != task.evaluate(Still(), seed=20)
    assert task.evaluate(Still(), episodes=1)["return"] == pytest.approx(rollout.returns[0], abs=0)


def test_summary():
    metrics = summary(np.array([5.0, 1, 2, 3, 4, 6, 7, 100]))
    assert metrics == pytest.approx(
        {"return": 16, "return_std": 31.8041, "return_iqm": 4.5, "return_min": 1, "return_max": 100, "episodes": 8}, rel=1e-4
    )
    assert summary(np.array([3.0]))["return_iqm"] == 3


def test_data_names_every_source_with_its_hash(make, path):
    task = make(episodes=3, held_out=1)
    assert task.data == {path: task.demonstrations.hash}
    assert task.dimensions == {"observation_dim": 24, "action_dim": 6}
    assert "walker/walk" in repr(task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, r"task 'walker/walk': horizon and episodes must be at least 1.*got horizon=0"),
        ({"held_out": -1}, r"the others at least 0, got horizon=1, held_out=-1"),
        ({"episodes": 0}, r"must be at least 1, .*episodes=0"),
        ({"seed": -1}, r"the others at least 0, got .*seed=-1"),
        ({"held_out": 4}, r"a\.npz has 4 episodes, nothing is left beside held_out=4"),
        ({"episodes": 3, "held_out": 2}, r"a\.npz has 4 episodes, asked for 5"),
    ],
)
def test_wrong_numbers(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_wrong_batches_and_evaluations(make):
    task = make()
    with pytest.raises(ValueError, match=r"task 'walker/walk': .* got batch_size=0, seed=0"):
        task.batches(batch_size=0, seed=0)
    with pytest.raises(ValueError, match=r"task 'walker/walk': .* got batch_size=1, seed=-1"):
        task.batches(batch_size=1, seed=-1)
    with pytest.raises(ValueError, match="task 'walker/walk' has no held-out demonstrations: set held_out"):
        task.validation(batch_size=1)
    with pytest.raises(ValueError, match="an evaluation takes 1 to 1000 episodes and a seed of at least 0, got 1001, 0"):
        task.evaluate(Still(), episodes=1001)


def test_demonstrations_of_another_environment(tmp_path):
    np.savez(tmp_path / "b.npz", **arrays(17, 6))
    task = ControlTask(name="x", demonstrations=str(tmp_path / "b.npz"), environment=WALK)
    with pytest.raises(ValueError, match=rf"'{WALK}' has 24 observations and 6 actions, but .*b\.npz has 17 and 6: they must be equal"):
        task.evaluate(Still())


@pytest.mark.parametrize(("file", "train", "held_out"), [("stand", 95, 5), ("walk", 10, 3), ("run", 10, 3)])
def test_shipped_tasks(file, train, held_out, monkeypatch):
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    monkeypatch.chdir(ROOT)
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        conf = compose(overrides=[f"+task=walker/{file}"])
    task = instantiate(conf.task, _convert_="all")
    assert (task.name, task.environment) == (f"walker/{file}", f"dm_control/walker-{file}")
    assert (len(task.demonstrations), len(task.held_out)) == (train, held_out)
    assert task.dimensions == {"observation_dim": 24, "action_dim": 6}


def test_batches_are_cheap(make):
    batches = make().batches(batch_size=256, seed=0)(0)
    next(batches)
    times = []
    for _ in range(200):
        started = time.perf_counter()
        next(batches)
        times.append(time.perf_counter() - started)
    assert np.median(times) < 2e-3


def test_training_needs_no_simulator():
    code = f"""
import sys
from skillbank.tasks.control import ControlTask
task = ControlTask(name="walk", demonstrations={str(ROOT / "demos/walker/walk.npz")!r}, environment={WALK!r})
next(task.batches(batch_size=2, seed=0)(0))
print(sorted({{"gymnasium", "dm_control", "mujoco", "minari", "h5py", "hydra"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
