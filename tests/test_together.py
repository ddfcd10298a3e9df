"""Skills that are trained at once are what they are when they are trained one by one."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from skillbank import fit, fresh, read
from skillbank.attach import detach
from skillbank.runtime.together import Together, together_batches
from tests.tiny import tiny_policy

STEPS = 6


def batches_of(seed, rows=4):
    def batches(start):
        step = start
        while True:
            generator = torch.Generator().manual_seed(1000 * seed + step)
            yield {
                "observation": torch.randn(rows, 5, generator=generator).double(),
                "action": torch.rand(rows, 1, 3, generator=generator).double() * 2 - 1,
                "weight": torch.rand(rows, generator=generator).double(),
            }
            step += 1

    return batches


def policy_of(dropout):
    policy = tiny_policy().double()
    for layer in policy.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = dropout
    return policy


OPTIONS = {"steps": STEPS, "log_every": 1, "progress": False, "device": "cpu", "ema": 0.5}


def alone(seed, *, rank, scale, dropout, **options):
    policy = policy_of(dropout)
    torch.manual_seed(seed)
    params = fresh(policy.net, rank=rank, scale=scale)
    came_to = fit(policy, batches_of(seed), params, seed=seed, **{**OPTIONS, **options})
    return [row["loss"] for row in came_to.rows], read(policy.net)


@pytest.mark.filterwarnings("ignore")  # of torch about itself
@pytest.mark.parametrize(("dropout", "compiled"), [(0.0, False), (0.3, False), (0.3, True)])
@pytest.mark.parametrize(
    ("seeds", "ranks", "scales", "lr"),
    [([3], 4, 16.0, [3e-3]), ([0, 1, 5], 4, 16.0, [3e-3] * 3), ([2, 0, 7], [1, 4, 3], [16.0, 2.0, 8.0], [3e-3, 1e-3, 1e-2])],
    ids=["one", "seeds", "hyperparameters"],
)
def test_losses_and_skills_are_those_of_runs_of_their_own(dropout, compiled, seeds, ranks, scales, lr):
    together = Together(policy_of(dropout), seeds, ranks=ranks, scales=scales)
    seen = []
    counters.clear()
    fit(
        together,
        together_batches([batches_of(seed) for seed in seeds]),
        together.groups(lr=lr),
        seed=seeds[0],
        validate=lambda: seen.append(together.latest) or 0.0,
        validate_every=1,
        compile=compiled,
        **OPTIONS,
    )
    assert counters["stats"]["unique_graphs"] == (1 if compiled else 0)
    for k, seed in enumerate(seeds):
        rank = ranks if isinstance(ranks, int) else ranks[k]
        scale = scales if isinstance(scales, float) else scales[k]
        losses, skill = alone(seed, rank=rank, scale=scale, dropout=dropout, lr=lr[k])
        torch.testing.assert_close(torch.stack(seen)[:, k], torch.tensor(losses).double(), rtol=1e-6, atol=1e-8)
        found = together.read(k)
        assert found.ranks == skill.ranks
        for name in skill:
            torch.testing.assert_close(found.delta(name), skill.delta(name), rtol=1e-6, atol=1e-9)
        assert max(float(skill.delta(name).abs().max()) for name in skill) > 1e-4


def test_the_base_is_untouched_and_comes_back():
    policy = tiny_policy()
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    together = Together(policy, [0, 1], ranks=2)
    batch = {"observation": torch.randn(6, 5), "action": torch.rand(6, 1, 3)}
    together(batch).backward()
    assert all(p.grad is None for p in policy.parameters())
    assert all(p.grad is not None for p in together.skills.parameters())
    together.detach()
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())
    expected = tiny_policy()
    torch.manual_seed(0)
    one = policy(batch)
    torch.manual_seed(0)
    assert torch.equal(one, expected(batch))


def test_what_cannot_be_trained_at_once_is_refused():
    policy = tiny_policy()
    with pytest.raises(ValueError, match="got 2 seeds, 3 ranks and 2 scales"):
        Together(policy, [0, 1], ranks=[1, 2, 3])
    together = Together(policy, [0, 1])
    with pytest.raises(ValueError, match="a batch of 5 rows is not for 2 skills"):
        together({"observation": torch.randn(5, 5), "action": torch.rand(5, 1, 3)})
    together.detach()
    with pytest.raises(ValueError, match=r"Linear has no losses\(batch\)"):
        Together(nn.Linear(2, 2), [0])

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 3))

        def losses(self, batch):
            return (self.net(batch["x"]) * torch.randn(3)).sum(1)

    with pytest.raises(ValueError, match=r"aten.randn.* draws what is not one row per row of the batch"):
        Together(Shared(), [0, 1])({"x": torch.randn(8, 3)})
    convolution = Shared()
    convolution.net = nn.Sequential(nn.Conv1d(2, 2, 1))
    with pytest.raises(ValueError, match="module '0' is no plain linear layer"):
        Together(convolution, [0], targets=["0"])
    detach(convolution.net)
