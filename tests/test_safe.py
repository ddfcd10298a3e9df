"""Rewards and costs at once: weights as in FISOR by hand, the stages of the example, a tiny cell of every row."""

import math
import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import skillbank as sb
from benchmarks import example_safe, psec_safe
from skillbank.models.critics import Critic
from tests.test_benchmarks import rows_of, run

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("value", "q", "advantage", "weight"),
    [
        (1.0, 0.5, 9.0, math.exp(2.5)),  # unsafe already, and it leads back: rewards do not count
        (1.0, 1.5, 9.0, math.exp(-2.5)),
        (9.0, 0.0, 0.0, 150.0),
        (-1.0, -0.5, 0.4, math.exp(1.2)),  # safe, and stays so
        (0.0, 0.0, -0.4, math.exp(-1.2)),
        (-1.0, -0.5, 9.0, 100.0),
        (-1.0, 0.1, 9.0, 0.0),  # safe, and would not stay so
    ],
)
def test_weights_of_one_policy_for_both_objectives(value, q, advantage, weight):
    given = (torch.tensor([each]) for each in (value, q, advantage))
    assert float(psec_safe.feasibility_weights(*given)) == pytest.approx(weight, rel=1e-6)


def test_what_the_critics_say_goes_into_these_weights():
    torch.manual_seed(0)
    reward, safety = Critic(3, 2, hidden=[8]), Critic(3, 2, hidden=[8], objective="hj")
    observation, action = torch.randn(64, 3), torch.rand(64, 2) * 2 - 1
    with torch.no_grad():
        value = safety.net["v"](observation)[:, 0]
        q = safety.target(observation, action).amax(0)
        advantage = reward.target(observation, action).amin(0) - reward.net["v"](observation)[:, 0]
    weights = psec_safe.Feasible(reward, safety).weights(observation, action)
    expected = [
        min(math.exp(5 * (v - h)), 150) if v > 0 else (min(math.exp(3 * a), 100) if h <= 0 else 0)
        for v, h, a in zip(value.tolist(), q.tolist(), advantage.tolist(), strict=True)
    ]
    assert 0 in expected
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_the_example_in_small(tmp_path, monkeypatch, capsys):
    """Every command of every stage in its order, and the table: what `make example-safe` does, without its training."""
    monkeypatch.setattr(example_safe, "FOLDER", tmp_path)
    monkeypatch.chdir(ROOT)
    from compose import compose as compose_entry
    from train import train as train_entry

    entries = {"train": train_entry, "compose": compose_entry}
    stages = example_safe.stages(dict.fromkeys(example_safe.STEPS, 2))
    for script, *overrides in (command for lanes in stages.values() for lane in lanes for command in lane):
        kind = script.removesuffix(".py")
        with initialize_config_dir(str(ROOT / "conf"), version_base=None):
            conf = compose(kind, [*overrides, f"bank={tmp_path / 'bank'}", "episodes=0", "batch_size=8"])
        entries[kind](conf)
    bank = sb.Bank(tmp_path / "bank")
    assert set(example_safe.ROWS.values()) <= {name for name, _ in bank.names()}
    task = example_safe.task()
    task.max_steps = 5
    rows = example_safe.table(bank, task).splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == list(example_safe.ROWS)
    low, high = task.return_range
    for row in rows:
        returned, _, normalised, *_ = (float(cell) for cell in row.split("|")[2:-1])
        assert normalised == pytest.approx((returned - low) / (high - low), abs=0.006)


def test_a_command_that_fails_ends_the_example(monkeypatch, tmp_path):
    monkeypatch.setattr(example_safe, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match="no such thing"):
        example_safe.run([("-c", "raise SystemExit('no such thing')")])


def test_quick_rows_of_the_experiment():
    done = run("benchmarks.psec_safe", "--quick", "--rows", "feasible", "tuned", "nsec", "gate-code", "gate-best")
    assert done.returncode == 0, done.stderr[-2000:]
    labels = [psec_safe.ROWS[row].label for row in ("tuned", "feasible", "nsec", "gate-code", "gate-best")]
    assert [row[""] for row in rows_of(done)] == [f"run: {label}" for label in labels]
    assert re.search(r"effective sample size 0\.\d+", done.stdout)
