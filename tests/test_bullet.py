"""The cars: what their controllers do to a simple car, what data are judged by, and what is said where Bullet is missing; with it, episodes."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from benchmarks import bullet_environment, psec_safe, psec_safe_bullet
from benchmarks.ball_data import Trajectories, choose, roll_out
from benchmarks.bullet.cars import AXLES, FASTEST, SWEEPS, CarCircler, CarRunner, accepted
from skillbank.tasks.environments import environment_sizes
from skillbank.tasks.rollouts import rollout
from tests.walkers import Policy

ROOT = Path(__file__).parents[1]
BULLET = pytest.mark.skipif(not (ROOT / ".venv-bullet/bin/python").exists(), reason="`make bullet` installs it")


class Car:
    """Cars without inertia or slip: what is steered is driven, and the speed follows the action within half a second."""

    steps = 300

    def __init__(self, dt, start):
        self.dt, self.begin = dt, start

    def start(self, rng, n):
        return np.tile(np.array(self.begin, float), (n, 1))

    def step(self, states, actions):
        x, y, vx, vy, yaw = states.T
        actions = np.clip(actions, -1, 1)
        going = -(vx * np.cos(yaw) + vy * np.sin(yaw))
        going = going + 2 * self.dt * (-FASTEST * actions[:, 0] - going)
        yaw = yaw - self.dt * going * np.tan(0.5 * actions[:, 1]) / AXLES
        vx, vy = -going * np.cos(yaw), -going * np.sin(yaw)
        states = np.stack([x + self.dt * vx, y + self.dt * vy, vx, vy, yaw], axis=1)
        return states, np.zeros(len(x)), np.zeros(len(x))

    def observe(self, states):
        return states.astype(np.float32)


def driven(car, controller, n=1, noise=0.0):
    return roll_out(car, controller, np.random.default_rng(0), n, np.full((n, 1), noise)).observations


def test_a_runner_holds_its_side_and_may_get_faster():
    sides = np.array([-1.0, 1.5])
    controller = CarRunner(np.array([1.2, 1.4]), np.array([0.1, 0.0]), np.array([2.0, 2.0]), np.array([1.0, 1.0]), sides)
    x, y, vx, *_ = np.moveaxis(driven(Car(1 / 30, (0, 0, 0, 0, np.pi)), controller, 2), -1, 0)
    for each, speed in enumerate(controller.speed):
        np.testing.assert_allclose(vx[each, (x[each] > 1.5) & (x[each] < 2)], speed, atol=0.15)
        assert y[each, -1] == pytest.approx(sides[each], abs=0.1)
        assert np.abs(y[each]).max() < abs(sides[each]) + 0.1
    assert np.diff(vx[0, x[0] > 2.5]).min() > 0
    assert vx[0, (x[0] > 4.5) & (x[0] < 5)].max() < 1.5
    assert vx[0, -1] > 2.2
    assert vx[1].max() < 1.45


@pytest.mark.parametrize("widths", [(5.0, 5.0), (5.5, 9.0), (9.0, 9.0)])
def test_a_circler_goes_round_clockwise_between_its_lines(widths):
    controller = CarCircler(np.array([2.5]), np.array([7.0]), np.array(widths)[:, None])
    x, y, vx, vy, _ = np.moveaxis(driven(Car(0.1, (3, 0, 0, 0, np.pi / 2)), controller)[0], -1, 0)
    assert (y * vx - x * vy)[20:].min() > 0
    assert x.min() > -min(widths[0], 7) - 0.3
    assert x.max() < min(widths[1], 7) + 0.3
    assert np.hypot(x, y)[50:].max() == pytest.approx(7, abs=0.4)


@pytest.mark.parametrize("kind", [CarRunner, CarCircler])
def test_many_controllers_do_what_each_does_alone(kind):
    together = kind.random(np.random.default_rng(1), 40)
    states = np.random.default_rng(2).normal(size=(40, 5))
    alone = [kind(**{name: value[..., i : i + 1] for name, value in vars(together).items()})(states[i : i + 1]) for i in range(40)]
    np.testing.assert_array_equal(together(states), np.concatenate(alone))


def trajectories(costs, returns):
    steps = 100
    rewards = np.repeat(np.array(returns, np.float32)[:, None] / steps, steps, axis=1)
    paid = (np.arange(steps) < np.array(costs)[:, None]).astype(np.float32)
    return Trajectories(np.zeros((len(costs), steps, 3)), np.zeros((len(costs), steps, 2)), rewards, paid, np.zeros((len(costs), 3)))


def test_what_data_are_judged_by():
    task = SWEEPS["car_run"]
    low, high = task.returns
    data = trajectories([0, 0, 8, 15, 25, 40], [low, high, low, high, high + 10, high + 20])
    assert accepted(task, data, data[np.array([1])]) == {
        "normalised return": f"{(4 + 30 / (high - low)) / 6:.2f}",
        "normalised cost": f"{88 / 60:.2f}",
        "within the limit": "50%",
        "and as good as the safe ones": "17%",
        "best return by quarter of the costs": f"{high:.0f}, {high:.0f}, {high + 10:.0f}, {high + 20:.0f}",
    }


def test_what_is_imitated_may_cost_what_a_task_says_and_few_others_are_safe():
    sweep = trajectories([0, 2, 5, 6, 50], [1, 2, 3, 4, 5])
    assert [each.tolist() for each in choose(sweep, 5)] == [[0, 1, 2, 3, 4], [1]]
    assert [each.tolist() for each in choose(sweep, 5, 100, 5)] == [[0, 1, 2, 3, 4], [2]]
    assert [each.tolist() for each in choose(sweep, 5, 100, 5, most_safe=2)] == [[0, 2, 3, 4], [2]]
    assert [each.tolist() for each in choose(sweep, 5, 100, 5, most_safe=0)] == [[2, 3, 4], [2]]


@pytest.mark.parametrize("name", [name for name in psec_safe.TASKS if psec_safe.Study(name, 0).bullet])
def test_the_configurations_of_the_cars(name, tmp_path, monkeypatch):
    """As DSRL has them, with the reward's scale that the ball's have; they load what the data command writes."""
    sweep, path = SWEEPS[name], psec_safe.TASKS[name]
    features, steps = bullet_environment.TASKS[sweep.environment]
    data = trajectories([0] * 30, range(30))
    data = Trajectories(np.zeros((30, 100, features), np.float32), *list(vars(data).values())[1:4], np.zeros((30, features), np.float32))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/bullet").mkdir(parents=True)
    for kind in ("", "_safe"):
        with initialize_config_dir(str(ROOT / "conf"), version_base=None):
            conf = compose("train", [f"task={path}{kind}"]).task
        assert tuple(conf.return_range) == sweep.returns
        assert conf.reward_scale == pytest.approx(steps / (sweep.returns[1] - sweep.returns[0]), rel=0.002)
        assert conf.environment == f"benchmarks.bullet_environment:bullet/{sweep.environment}"
        np.savez_compressed(conf.demonstrations, **vars(data))
        task = instantiate(conf, _convert_="all")
        assert task.name == f"{path}{kind}"
        assert len(task.demonstrations) == (25 if kind else 10)
        assert next(task.batches(batch_size=4, seed=0)(0))["cost"].shape == (4,)


def test_without_bullet_it_is_said_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bullet_environment, "ROOT", tmp_path)
    with pytest.raises(ImportError, match="run `make bullet`"):
        bullet_environment.python()
    with pytest.raises(ImportError, match="run `make bullet`"):
        bullet_environment.ensure_data("car_run")
    bullet_environment.simulator.cache_clear()
    with pytest.raises(ImportError, match="run `make bullet`"):
        environment_sizes("benchmarks.bullet_environment:bullet/SafetyCarRun-v0")
    for module, options in ((psec_safe, ["--tasks", "car_circle"]), (psec_safe_bullet, [])):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results.jsonl")
        monkeypatch.setattr(sys, "argv", ["", *options])
        with pytest.raises(SystemExit, match="2"):
            module.main()
        assert "run `make bullet`" in capsys.readouterr().err


@BULLET
def test_episodes_in_bullet_are_functions_of_seed_and_actions():
    environment = "benchmarks.bullet_environment:bullet/SafetyCarRun-v0"
    assert environment_sizes(environment) == (7, 2)
    policy = Policy(7, 2)
    first = rollout(policy, environment, [5, 6, 7], max_steps=40)
    again = rollout(policy, environment, [7, 5], max_steps=40)
    assert again.returns.tolist() == first.returns[[2, 0]].tolist()
    assert len(set(first.returns)) == 3
    assert first.costs is not None
    assert rollout(policy, environment, [5]).lengths.tolist() == [200]
