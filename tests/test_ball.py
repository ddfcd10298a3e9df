"""The ball's tasks: mechanics against the closed form, the environments, and the shipped behaviour data."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from benchmarks.ball_data import KEPT, SAFE_COST, Runner, generate, roll_out
from skillbank.tasks.ball import DRAG, DRAG_SLOPE, FRICTION, PUSH, TASKS
from skillbank.tasks.environments import environment_sizes, make_environment
from skillbank.tasks.rollouts import rollout
from tests.walkers import Policy

ROOT = Path(__file__).parents[1]
IDS = {"run": "skillbank/BallRun-v0", "circle": "skillbank/BallCircle-v0"}
LIMITS = {"run": (26.34, 1327.45), "circle": (0.383, 881.46)}
"""Least and most return that DSRL (arXiv 2306.09303) divides by."""


def shipped(name):
    with np.load(ROOT / "demos/ball" / f"{name}.npz") as arrays:
        return dict(arrays)


def normalised(name, returns):
    low, high = LIMITS[name]
    return (returns - low) / (high - low)


@pytest.mark.parametrize("name", TASKS)
def test_many_balls_move_as_each_alone(name):
    task, rng = TASKS[name], np.random.default_rng(0)
    together = task.start(rng, 7)
    alone = list(together)
    for _ in range(task.steps):
        actions = rng.uniform(-1.5, 1.5, (7, 2))
        alone = [task.step(state, action) for state, action in zip(alone, actions, strict=True)]
        together = task.step(together, actions)
        for mine, theirs in zip(together, zip(*alone, strict=True), strict=True):
            assert np.array_equal(mine, np.stack(theirs))
        together, alone = together[0], [each[0] for each in alone]
        assert np.array_equal(task.observe(together), np.stack([task.observe(state) for state in alone]))


def test_a_pushed_ball_reaches_the_speed_at_which_drag_holds_it():
    states = np.zeros((1, 4))
    for _ in range(1000):
        states, *_ = TASKS["run"].step(states, np.array([[0.6, -0.8]]))
    speed = np.hypot(*states[0, 2:])
    assert DRAG * (1 + DRAG_SLOPE * speed) * speed + FRICTION == pytest.approx(PUSH, rel=1e-6)
    np.testing.assert_allclose(states[0, 2:] / speed, [0.6, -0.8], atol=1e-9)


def test_a_ball_left_alone_comes_to_rest_and_a_weak_push_does_not_move_it():
    states = np.array([[0.0, 0, 3, 4], [0, 0, 0, 0]])
    for _ in range(500):
        states, *_ = TASKS["run"].step(states, np.array([[0, 0], [0.9 * FRICTION / PUSH, 0]]))
    assert not states[:, 2:].any()
    assert states[0, 1] / states[0, 0] == pytest.approx(4 / 3)
    assert not states[1].any()


def test_what_run_pays_and_costs():
    run = TASKS["run"]
    before = np.zeros((5, 4))
    after = np.array([[1, 0, 2.5, 0], [1, 0, 1.8, -1.8], [-1, 2.01, 0, 0], [0, -2, 0, 0], [0, -2.01, 9, 0]])
    np.testing.assert_allclose(run.reward(before, after, np.tile([0.6, -0.8], (5, 1)))[[0, 2]], [59.5, -60.5], atol=0.2)
    assert run.cost(after).tolist() == [0, 1, 1, 0, 1]
    np.testing.assert_allclose(run.observe(np.array([1.0, -2, 3, -4])), [0.1, -0.2, 0.6, -0.8, 0.8, 0.6, 0], rtol=1e-6)


def test_what_circle_pays_and_costs():
    circle = TASKS["circle"]
    states = np.array([[0, 7, 3, 0], [7, 0, 0, -3], [7, 0, 0, 3], [0, 5, 3, 9], [-6.01, 0, 0, 0]])
    rewards = circle.reward(states, states, np.tile([0, 1.0], (5, 1)))
    np.testing.assert_allclose(rewards + 0.005, [2.1, 2.1, -2.1, 0.5, 0])
    assert circle.cost(states).tolist() == [0, 1, 1, 0, 1]
    np.testing.assert_allclose(circle.observe(states)[:, 7], [0, 0, 0, -0.2, -0.099], atol=1e-6)


def test_walls_hold_the_ball_on_the_circle():
    states, angles = TASKS["circle"].start(np.random.default_rng(1), 40), np.linspace(0, 2 * np.pi, 40)
    for _ in range(200):
        states, *_ = TASKS["circle"].step(states, np.stack([np.cos(angles), np.sin(angles)], axis=1))
    corners = np.abs(states[:, :2] @ np.array([[1, 0, np.sqrt(0.5), np.sqrt(0.5)], [0, 1, np.sqrt(0.5), -np.sqrt(0.5)]]))
    np.testing.assert_allclose(corners.max(axis=1), 11.4, atol=1e-6)


@pytest.mark.parametrize("name", TASKS)
def test_the_environment_keeps_gymnasiums_contract(name):
    env = make_environment(IDS[name], render_mode="rgb_array")
    check_env(env.unwrapped)
    assert environment_sizes(IDS[name]) == (TASKS[name].features, 2)
    assert env.spec.max_episode_steps == TASKS[name].steps
    first = env.reset(seed=3)[0]
    assert not np.array_equal(first, env.reset()[0])
    assert np.array_equal(first, env.reset(seed=3)[0])
    ends = [env.step(np.float32([0.3, 0.1]))[2:4] for _ in range(TASKS[name].steps)]
    assert ends == [(False, False)] * (TASKS[name].steps - 1) + [(False, True)]
    frame = env.render()
    assert (frame.shape, frame.dtype) == ((240, 320, 3), np.uint8)
    assert len(np.unique(frame.reshape(-1, 3), axis=0)) == 3
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"Cannot call env.step\(\) before"):
        gymnasium.make(IDS[name]).step(np.zeros(2, np.float32))


@pytest.mark.parametrize("name", TASKS)
def test_the_environment_is_the_simulation(name):
    env, task = make_environment(IDS[name]), TASKS[name]
    env.reset(seed=4)
    states = env.unwrapped.state[None]
    for action in np.random.default_rng(0).uniform(-1, 1, (30, 2)).astype(np.float32):
        states, rewards, costs = task.step(states, action[None])
        observation, reward, _, _, info = env.step(action)
        assert np.array_equal(observation, task.observe(states)[0])
        assert (reward, info["cost"]) == (rewards[0], costs[0])


def test_policies_are_rolled_out_in_it():
    result = rollout(Policy(8, 2), IDS["circle"], [0, 1])
    assert result.lengths.tolist() == [200, 200]


def test_a_slow_controller_is_safe_and_a_fast_one_is_not():
    start = {"turn": np.zeros(4), "side": np.zeros(4)}
    slow, fast = (
        roll_out(TASKS["run"], Runner(np.full((2, 4), speed), **start), np.random.default_rng(0), 4, noise=np.zeros((4, 1))) for speed in (2.4, 9)
    )
    assert slow.cost.tolist() == [0] * 4
    assert fast.cost.min() > 80
    assert 400 < slow.returns.min() < slow.returns.max() < 500
    assert normalised("run", fast.returns).min() > 0.8


@pytest.mark.parametrize("name", TASKS)
def test_shipped_data_come_from_their_command(name):
    sweep, data, imitated = generate(name)
    for leaf, each in {name: data, f"{name}_safe": imitated}.items():
        file = shipped(leaf)
        assert set(file) == set(vars(each))
        for array, values in vars(each).items():
            assert np.array_equal(file[array], values), array
        assert (ROOT / "demos/ball" / f"{leaf}.npz").stat().st_size < 2_000_000
    safe = sweep.cost <= SAFE_COST
    assert (sweep.returns[safe] > imitated.returns.min()).mean() <= 0.1


@pytest.mark.parametrize("name", TASKS)
def test_shipped_data_replay_in_the_environment(name):
    file, task = shipped(name), TASKS[name]
    assert file["observations"].shape == (KEPT[name], task.steps, task.features)
    states = np.concatenate([10 * file["observations"][:, 0, :2], 5 * file["observations"][:, 0, 2:4]], axis=1).astype(np.float64)
    for step in range(task.steps):
        np.testing.assert_allclose(task.observe(states), file["observations"][:, step], atol=1e-5)
        states, rewards, _ = task.step(states, file["actions"][:, step])
        np.testing.assert_allclose(rewards, file["rewards"][:, step], atol=1e-3)
    np.testing.assert_allclose(task.observe(states), file["finals"], atol=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_shipped_data_are_as_hard_as_they_should_be(name):
    """Return and cost pull against each other, the mean trajectory is good and far from safe, and few show what is wanted."""
    file = shipped(name)
    returns, cost = file["rewards"].sum(axis=1), file["costs"].sum(axis=1)
    assert set(np.unique(file["costs"])) == {0, 1}
    assert np.histogram(cost, 8, (0, 80))[0].min() >= 15
    edge = [returns[cost <= limit].max() for limit in (2, 20, 40, 60)]
    assert np.diff(edge).min() > 5
    assert edge[-1] > 1.4 * edge[0]
    assert 0.5 < normalised(name, returns).mean() < 0.8
    assert cost.mean() / 10 > 3
    assert ((cost <= 10) & (returns > 0.8 * edge[0])).mean() < 0.15


@pytest.mark.parametrize("name", TASKS)
def test_the_imitation_set_is_the_best_of_the_safe_data(name):
    data, imitated = shipped(name), shipped(f"{name}_safe")
    returns, cost = imitated["rewards"].sum(axis=1), imitated["costs"].sum(axis=1)
    assert 25 <= len(cost) <= 35
    assert cost.max() <= 2
    assert returns.min() > {"run": 370, "circle": 460}[name]
    ours = {each.tobytes() for each in data["actions"]}
    assert {each.tobytes() for each in imitated["actions"]} < ours
