"""Every model that ships keeps the contract: plain, with a skill on it, and composed."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from transformers import PreTrainedModel

from skillbank import Composed, ConstantGate, MLPGate, attach, check_model, fresh
from skillbank.load import build
from skillbank.tokenizer import byte_tokenizer, kept
from tests.tiny import random_skill

CONF = Path(__file__).parents[1] / "conf"
MODELS = sorted((CONF / "model").rglob("*.yaml"))
D, A = 7, 3
SIZES = {
    "critic": {"observation_dim": D, "action_dim": A},
    "diffusion": {"observation_dim": D, "action_dim": A},
    "causal": {"tokenizer": kept(byte_tokenizer())},
    "classifier": {"tokenizer": kept(byte_tokenizer()), "classes": ["no", "yes"]},
}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def test_there_are_models():
    assert {path.stem for path in MODELS} == set(SIZES)


@pytest.fixture(params=MODELS, ids=lambda path: path.stem)
def model(request):
    conf = yaml.safe_load(request.param.read_text())
    if "net" in conf:
        conf["net"] |= SMALL
    return build(conf, **SIZES[request.param.stem]).eval()


def example(model, rows):
    if isinstance(model.net, PreTrainedModel):
        words = torch.randint(2, 258, (rows, 9))
        return {"input_ids": words, "label": torch.randint(2, (rows,))} if hasattr(model, "classes") else {"input_ids": words}
    horizon = getattr(model, "horizon", 1)
    came = {"reward": torch.randn(rows), "next_observation": torch.randn(rows, D), "mask": torch.ones(rows)} if hasattr(model, "advantages") else {}
    return {"observation": torch.randn(rows, D), "action": torch.rand(rows, horizon, A) * 2 - 1, **came}


def skill_on(net, **options):
    """On what a fresh skill would be on."""
    last = getattr(net, "get_output_embeddings", lambda: None)()
    body = [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear) and layer is not last and "classifier" not in name]
    return random_skill(net, modules=body, **options)


def plain(model):
    return model


def with_a_fresh_skill(model):
    fresh(model.net, rank=2)
    return model


def with_a_skill(model):
    attach(model.net, skill_on(model.net))
    return model


def with_a_gate(model):
    skills = [skill_on(model.net, rank=rank, seed=rank) for rank in (1, 3)]
    return Composed(model, MLPGate(model.context(example(model, 1)).shape[-1], 2, hidden=[8]), skills)


def with_constant_weights(model):
    return Composed(model, ConstantGate(D, 1), [skill_on(model.net)], regulariser="mean")


@pytest.mark.parametrize("made", [plain, with_a_fresh_skill, with_a_skill, with_a_gate, with_constant_weights])
@pytest.mark.parametrize("rows", [1, 5])
def test_the_contract(model, made, rows):
    batch = example(model, rows)
    check_model(made(model), batch)
