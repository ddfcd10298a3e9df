"""Where a skill's effect sits."""

import pytest
import torch
from torch import nn

from skillbank import Skill, attach, graft, read
from tests.tiny import close


class Regression(nn.Module):
    """Two layers; the loss is the distance from what they compute with a skill."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()

    def forward(self, batch):
        return (self.net(batch["x"]) - batch["y"]).square().sum(1).mean()


def skill_of(sizes):
    """Orthogonal directions of these sizes, per module."""
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for name, (out, inner) in {"0": (8, 6), "2": (5, 8)}.items():
        rank = len(sizes[name])
        a = torch.linalg.qr(torch.randn(inner, rank, generator=generator, dtype=torch.float64))[0].mT
        b = torch.linalg.qr(torch.randn(out, rank, generator=generator, dtype=torch.float64))[0]
        factors[name] = (a, b * torch.tensor(sizes[name]))
    return Skill(factors)


def batches_of(model, skill):
    generator = torch.Generator().manual_seed(2)
    xs = [torch.randn(64, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    attach(model.net, skill)
    with torch.no_grad():
        return [{"x": x, "y": model.net(x)} for x in xs]


def test_the_directions_that_matter_are_found():
    model, skill = Regression(), skill_of({"0": [0.02, 0.01, 0.01], "2": [2.0, 0.03, 1.5, 0.01]})
    found = graft(model, skill, batches_of(model, skill), keep=0.95)
    assert (found.directions, found.of) == (2, 7)
    assert 0.95 <= found.effect <= 1.01
    assert set(found.skill) == {"2"}
    a, b = skill["2"]
    close(found.skill.delta("2"), b[:, [0, 2]] @ a[[0, 2]], 1e-9)
    close(read(model.net).delta("2"), found.skill.delta("2"), 1e-9)


def test_importance_adds_up_to_the_effect_and_fewer_would_not_do():
    model, skill = Regression(), skill_of({"0": [0.8, 0.5, 0.3], "2": [0.9, 0.6, 0.4, 0.2]})
    batches = batches_of(model, skill)
    found = graft(model, skill, batches, keep=0.9, steps=64)
    assert sum(float(each.sum()) for each in found.importance.values()) == pytest.approx(1, abs=1e-3)
    assert found.effect >= 0.9
    assert found.directions < found.of
    assert graft(model, skill, batches, keep=1.0, steps=64).directions == 7
    order = torch.cat(list(found.importance.values())).sort(descending=True).values
    one_less = graft(model, skill, batches, keep=found.effect - 1e-9, steps=64)
    assert one_less.directions == found.directions
    assert len(order) == found.of


def test_a_skill_without_an_effect():
    model, skill = Regression(), skill_of({"0": [0.5], "2": [0.5]})
    attach(model.net, Skill({name: (a, 0 * b) for name, (a, b) in skill.factors.items()}))
    batches = batches_of(model, Skill({name: (a, 0 * b) for name, (a, b) in skill.factors.items()}))
    with pytest.raises(ValueError, match="the skill has no effect to keep: the loss is 0 without it"):
        graft(model, skill, batches)
    with pytest.raises(ValueError, match=r"got 0 batches, steps=8 and keep=0\.95"):
        graft(model, skill, [])
    with pytest.raises(ValueError, match=r"a share to keep in \(0, 1\]; got 2 batches, steps=8 and keep=1.5"):
        graft(model, skill, batches, keep=1.5)
