"""Every model that ships keeps the contract: plain, with a skill on it, and composed."""

from pathlib import Path

import pytest
import torch
import yaml

from skillbank import Composed, ConstantGate, MLPGate, attach, check_model, fresh
from skillbank.load import build
from tests.tiny import random_skill

CONF = Path(__file__).parents[1] / "conf"
MODELS = sorted((CONF / "model").rglob("*.yaml"))
D, A = 7, 3


def test_there_are_models():
    assert MODELS


@pytest.fixture(params=MODELS, ids=lambda path: path.stem)
def model(request):
    return build(yaml.safe_load(request.param.read_text()), observation_dim=D, action_dim=A)


def example(model, rows):
    horizon = getattr(model, "horizon", 1)
    return {"observation": torch.randn(rows, D), "action": torch.rand(rows, horizon, A) * 2 - 1}


def plain(model):
    return model


def with_a_fresh_skill(model):
    fresh(model.net, rank=2)
    return model


def with_a_skill(model):
    attach(model.net, random_skill(model.net))
    return model


def with_a_gate(model):
    skills = [random_skill(model.net, rank=rank, seed=rank) for rank in (1, 3)]
    return Composed(model, MLPGate(D, 2, hidden=[8]), skills)


def with_constant_weights(model):
    return Composed(model, ConstantGate(D, 1), [random_skill(model.net)], regulariser="mean")


@pytest.mark.parametrize("made", [plain, with_a_fresh_skill, with_a_skill, with_a_gate, with_constant_weights])
@pytest.mark.parametrize("rows", [1, 5])
def test_the_contract(model, made, rows):
    check_model(made(model), example(model, rows))
