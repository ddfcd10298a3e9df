"""The laws of rollouts."""

import numpy as np
import pytest
import torch

from skillbank.tasks.rollouts import rollout
from tests.walkers import WALK, Policy, Short, suite_episode


def test_rollouts_repeat_and_leave_no_trace():
    policy = Policy(noise=0.3).train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = rollout(policy, WALK, [4, 9], max_steps=20)
    assert torch.equal(torch.rand(3), expected)
    assert policy.training
    torch.manual_seed(99)
    two = rollout(policy, WALK, [4, 9], max_steps=20)
    assert np.array_equal(one.returns, two.returns)
    assert policy.calls == [((2, 24), False, True)] * 40
    assert not np.array_equal(one.returns, rollout(policy, WALK, [4, 10], max_steps=20).returns)
    assert one.lengths.tolist() == [20, 20]
    assert one.seeds.tolist() == [4, 9]
    assert one.policy_seconds > 0
    assert one.environment_seconds > 0


def test_an_episode_does_not_depend_on_the_others():
    together = rollout(Policy(), WALK, [3, 8, 1], max_steps=40).returns
    alone = [rollout(Policy(), WALK, [seed], max_steps=40).returns[0] for seed in (3, 8, 1)]
    assert together.tolist() == alone


@pytest.mark.usefixtures("registered")
def test_episodes_of_different_lengths():
    policy = Policy(2, 2)
    result = rollout(policy, "Short-v0", [3, 1, 5])
    assert result.lengths.tolist() == [3, 1, 5]
    assert result.returns.tolist() == [6, 1, 15]
    assert [shape for shape, *_ in policy.calls] == [(3, 2)] * 5
    assert rollout(policy, "Short-v0", [3, 1, 5], max_steps=2).returns.tolist() == [3, 1, 3]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(("execute", "decisions"), [(None, 2), (3, 2), (2, 3), (1, 5)])
def test_chunks_are_executed_in_order(execute, decisions):
    policy = Policy(2, 2, horizon=3)
    result = rollout(policy, "Short-v0", [5], execute=execute)
    assert (result.lengths.tolist(), len(policy.calls)) == ([5], decisions)
    gain = np.tile(policy.gain.detach().numpy()[: execute or 3], (5, 1))[:5]
    seen = np.array([[5.0, step - step % (execute or 3)] for step in range(5)])
    scaled = np.tanh(seen * gain)
    np.testing.assert_allclose(np.stack(Short.seen), scaled * [2, 0.5] + [0, 0.5], atol=1e-6)


@pytest.mark.usefixtures("registered")
def test_actions_are_clipped_before_they_are_rescaled():
    policy = Policy(2, 2)
    policy.predict = lambda batch: torch.full((len(batch["observation"]), 1, 2), 7.0)
    rollout(policy, "Short-v0", [2])
    np.testing.assert_allclose(np.stack(Short.seen), [[2, 1], [2, 1]])


def test_a_recording_is_the_episode():
    from dm_control import _render

    result = rollout(Policy(), WALK, [2, 6], max_steps=7, record=1, frame_every=3 if _render.BACKEND == "egl" else 0, size=(48, 64))
    recording = result.recording
    assert recording.observations.shape == (7, 24)
    assert recording.rewards.sum() == result.returns[1]
    observations, rewards = suite_episode("walk", 6, recording.actions)
    assert np.array_equal(recording.observations, observations[:-1])
    assert recording.rewards.tolist() == rewards.tolist()
    if recording.every:
        assert (recording.frames.shape, recording.frames.dtype) == ((3, 48, 64, 3), np.uint8)
        assert recording.frames.std() > 1
    assert np.array_equal(result.returns, rollout(Policy(), WALK, [2, 6], max_steps=7).returns)


class Wrong(Policy):
    def __init__(self, answer, **sizes):
        super().__init__()
        self.answer = answer
        for name, size in sizes.items():
            setattr(self, name, size)

    def predict(self, batch):
        return self.answer(len(batch["observation"]))


def bad_rows(value):
    def answer(rows):
        actions = torch.zeros(rows, 1, 6)
        actions[1:, 0, 2] = value
        return actions

    return answer


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Wrong(bad_rows(torch.nan)), {}, r"NaN or infinite actions for 'dm_control/walker-walk' at step 0, in 2 of 3 rows"),
        (Wrong(bad_rows(torch.inf)), {}, r"NaN or infinite actions for 'dm_control/walker-walk' at step 0, in 2 of 3 rows"),
        (Wrong(lambda rows: torch.zeros(rows, 6)), {}, r"must predict actions \(3, H, 6\) for 'dm_control/walker-walk', got \(3, 6\)"),
        (Wrong(lambda rows: torch.zeros(rows, 1, 5)), {}, r"must predict actions \(3, H, 6\) for 'dm_control/walker-walk', got \(3, 1, 5\)"),
        (Wrong(lambda rows: torch.zeros(1, 1, 6)), {}, r"must predict actions \(3, H, 6\) for 'dm_control/walker-walk', got \(1, 1, 6\)"),
        (Policy(horizon=2), {"execute": 3}, r"execute=3 must be between 1 and the H=2 actions"),
        (Policy(), {"execute": 0}, r"execute=0 must be between 1 and the H=1 actions"),
        (Wrong(None, observation_dim=17), {}, r"'dm_control/walker-walk' has observation_dim=24, the model has observation_dim=17"),
        (Wrong(None, action_dim=3), {}, r"'dm_control/walker-walk' has action_dim=6, the model has action_dim=3"),
        (Policy(), {"record": 3}, r"record=3 is no position in 3 seeds"),
    ],
)
def test_wrong_models(model, options, message):
    with pytest.raises(ValueError, match=message):
        rollout(model, WALK, [0, 1, 2], **options)


@pytest.mark.parametrize("seeds", [[], [-1], [2**32]])
def test_wrong_seeds(seeds):
    with pytest.raises(ValueError, match=r"seeds must be one or more integers in \[0, 2\*\*32\), got \["):
        rollout(Policy(), WALK, seeds)


@pytest.mark.usefixtures("registered")
def test_an_environment_without_an_end_needs_max_steps():
    with pytest.raises(ValueError, match="environment 'Open-v0' has no time limit: give max_steps"):
        rollout(Policy(2, 2), "Open-v0", [3])
    assert rollout(Policy(2, 2), "Open-v0", [3], max_steps=2).lengths.tolist() == [2]
