"""Statistics of a model's layers, against what autograd says example by example."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from skillbank import attach, fisher_factors, fresh, input_grams, merge, start_from_inputs
from skillbank.attach import factors
from tests.tiny import close, random_skill


class Small(nn.Module):
    """Two layers on tokens; the loss is a mean over examples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.ModuleDict({"first": nn.Linear(5, 4), "second": Conv1D(3, 4), "norm": nn.LayerNorm(3)}).double()

    def forward(self, batch):
        hidden = self.net["first"](batch["x"]).tanh()
        return (self.net["norm"](self.net["second"](hidden)) - batch["y"]).square().sum((1, 2)).mean()


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(6, 2, 5, generator=generator).double(), "y": torch.randn(6, 2, 3, generator=generator).double()} for _ in range(count)]


def test_grams_are_sums_over_examples_and_tokens():
    model = Small()
    found = input_grams(model, ["first", "second"], batches())
    x = torch.cat([batch["x"].flatten(0, 1) for batch in batches()])
    close(found["first"], x.mT @ x)
    hidden = model.net["first"](x).tanh().detach()
    close(found["second"], hidden.mT @ hidden)
    close(input_grams(model, ["first"], batches(), steps=1)["first"], batches()[0]["x"].flatten(0, 1).mT @ batches()[0]["x"].flatten(0, 1))


def test_fisher_factors_are_mean_squares_of_an_examples_gradients():
    model = Small()
    found = fisher_factors(model, ["first", "second"], batches())
    inputs, outputs = {"first": [], "second": []}, {"first": [], "second": []}
    for batch in batches():
        for i in range(6):
            one = {key: value[i : i + 1] for key, value in batch.items()}
            seen = {}
            for name in inputs:
                hook = model.net[name].register_forward_hook(lambda _, x, out, name=name, seen=seen: seen.update({name: (x[0], out)}))
                loss = model(one)
                hook.remove()
                x, out = seen[name]
                inputs[name].append(x.detach()[0])
                outputs[name].append(torch.autograd.grad(loss, out)[0][0])
    for name, (out, inner) in found.items():
        close(out, torch.cat(outputs[name]).square().mean(0))
        close(inner, torch.cat(inputs[name]).square().mean(0))


def test_the_model_is_left_as_it_was():
    model = Small().train()
    model.net["first"].weight.requires_grad_(False)
    model.net["second"].weight.grad = torch.ones_like(model.net["second"].weight)
    fisher_factors(model, ["first", "second"], batches())
    assert model.training
    assert not model.net["first"].weight.requires_grad
    assert model.net["first"].weight.grad is None
    assert torch.equal(model.net["second"].weight.grad, torch.ones_like(model.net["second"].weight))
    assert not model.net["first"]._forward_hooks


def test_merges_that_ask_for_them():
    model = Small()
    model.net.float()
    skills = [random_skill(model.net, rank=2, modules=["first"], seed=seed) for seed in range(2)]
    seen = [{key: value.float() for key, value in batch.items()} for batch in batches()]
    grams, fishers = [], []
    for skill in skills:
        attach(model.net, skill)
        grams.append(input_grams(model, skill, seen))
        fishers.append(fisher_factors(model, skill, seen))
    assert set(merge(skills, method="regmean", grams=grams)) == {"first"}
    merged = merge(skills, method="fisher", fishers=fishers, rank=4)
    low, high = torch.stack([skill.delta("first") for skill in skills]).aminmax(dim=0)
    assert ((merged.delta("first") >= low - 1e-5) & (merged.delta("first") <= high + 1e-5)).all(), "a mean lies between"


def test_what_cannot_be_gathered():
    model = Small()
    with pytest.raises(ValueError, match="module 'norm' is LayerNorm: statistics are gathered of linear layers only"):
        input_grams(model, ["norm"], batches())
    with pytest.raises(ValueError, match=r"modules \['first'\] never ran: give batches"):
        input_grams(model, ["first"], [])
    skills = [random_skill(model.net.float(), rank=2, modules=["first"], seed=seed) for seed in range(2)]
    with pytest.raises(ValueError, match="fisher needs the Fisher factors of every skill, got 0"):
        merge(skills, method="fisher")
    with pytest.raises(ValueError, match=r"fisher needs factors \(4, 5\) of module 'first'"):
        merge(skills, method="fisher", fishers=[{}, {}])


def test_factors_start_where_the_inputs_vary_most():
    model = Small()
    before = model(batches()[0])
    fresh(model.net, rank=2, targets=["first", "second"])
    start_from_inputs(model, batches())
    close(model(batches()[0]), before)
    x = torch.cat([batch["x"].flatten(0, 1) for batch in batches()])
    with torch.no_grad():
        inputs = {"first": x, "second": model.net["first"](x).tanh()}
    for name, (a, b) in factors(model.net).items():
        expected = torch.linalg.svd(inputs[name] - inputs[name].mean(0)).Vh[:2]
        close(a.mT.double() @ a.double(), expected.mT @ expected, 1e-6)
        close((a.double() * expected).sum(1).abs(), torch.ones(2).double(), 1e-6)
        assert not b.any()
    fresh(model.net, rank=2, targets=["first"], init="pissa")
    with pytest.raises(ValueError, match="module 'first' has a B that is not 0, so that another A would change the outputs"):
        start_from_inputs(model, batches())
    fresh(model.net, rank=5, targets=["second"])
    with pytest.raises(ValueError, match="module 'second' has 4 inputs, fewer than rank 5: give a smaller rank"):
        start_from_inputs(model, batches())
    fresh(model.net, rank=2, targets=["second"])
    with pytest.raises(ValueError, match=r"modules \['second'\] never ran"):
        start_from_inputs(model, [])


@pytest.mark.filterwarnings("ignore")  # of PEFT about the rank that it keeps
def test_they_start_as_those_of_peft():
    model, rows = nn.Module(), torch.randn(64, 12, generator=torch.Generator().manual_seed(2)) * 0.5 ** torch.arange(12)
    torch.manual_seed(0)
    model.net = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))
    model.forward = lambda batch: model.net(batch["x"]).square().mean()
    config = peft.LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
    theirs = peft.get_peft_model(copy.deepcopy(model.net), config)
    options = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
    peft.initialize_lora_eva_weights(theirs, [{"x": rows}] * 4, forward_fn=lambda net, batch: net(batch["x"]), **options)
    fresh(model.net, rank=3)
    start_from_inputs(model, [{"x": rows}])
    for name, (a, _) in factors(model.net).items():
        expected = theirs.base_model.model.get_submodule(name).lora_A.default.weight
        close(a.mT @ a, expected.mT @ expected, 2e-3)  # theirs are of a randomised decomposition
