import copy
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from skillbank import Folding, Skill, attach, detach, fold, fresh, read, stack
from skillbank.attach import base_weights
from tests.tiny import close, net_inputs, random_skill, tiny_policy


class Zoo(nn.Module):
    """One of every layer that can carry B @ A, with a name that ends another name."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.image = nn.Conv2d(1, 2, 3, bias=False)
        self.inner = nn.Sequential(nn.Linear(6, 6))
        self.linear = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(6, 5))})
        self.norm = nn.LayerNorm(5)
        self.grouped = nn.Conv1d(8, 8, 3, groups=2)

    def forward(self, ids):
        x = self.conv(self.words(ids).mT)
        x = x + self.image(x[:, None]).mean(dim=(1, 2, 3))[:, None, None]
        return self.norm(self.linear["inner"](self.inner(x.mT).relu()))


TARGETS = ["words", "conv", "image", "inner.0", "linear.inner.0"]
IDS = torch.arange(10).reshape(2, 5)


def trained(net, **options):
    with torch.no_grad():
        for parameter in fresh(net, **options):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return read(net)


@pytest.fixture
def zoo():
    torch.manual_seed(1)
    return Zoo().eval().requires_grad_(False)


def test_a_fresh_skill_is_the_base_exactly_and_only_its_factors_train(zoo):
    before = zoo(IDS)
    params = fresh(zoo, rank=3, targets=TARGETS)
    assert torch.equal(zoo(IDS), before)
    zoo(IDS).sum().backward()
    assert {id(p) for p in zoo.parameters() if p.grad is not None} <= {id(p) for p in params}
    assert {id(p) for p in zoo.parameters() if p.requires_grad} == {id(p) for p in params}
    assert len(params) == 10


def test_the_scale_multiplies_in_training_and_is_folded_on_reading(zoo):
    skill = trained(zoo, rank=3, scale=7.0, targets="linear.inner.0")
    layer = zoo.linear["inner"][0]
    x = torch.randn(4, 6)
    live = layer(x) - layer.base_layer(x)
    close(live, 7 * x @ layer.lora_A["default"].weight.mT @ layer.lora_B["default"].weight.mT)
    close(live, x @ skill.delta("linear.inner.0").mT)


def test_read_is_the_inverse_of_attach_on_every_layer(zoo):
    skill = trained(zoo, rank=3, targets=TARGETS)
    with_skill = zoo(IDS)
    detach(zoo)
    assert not torch.allclose(zoo(IDS), with_skill)
    attach(zoo, skill)
    close(zoo(IDS), with_skill)
    again = read(zoo)
    assert again.fingerprint == skill.fingerprint
    assert again.embeddings == {"words"}
    assert not any(p.requires_grad for layer in TARGETS for n, p in zoo.get_submodule(layer).named_parameters() if "lora" in n)


def test_the_delta_is_the_change_of_the_weight(zoo):
    skill = trained(zoo, rank=2, targets=TARGETS)
    with_skill = zoo(IDS)
    detach(zoo)
    with torch.no_grad():
        for name in skill:
            weight, delta = zoo.get_submodule(name).weight, skill.delta(name)
            weight += delta.mT if name in skill.embeddings else delta
    close(zoo(IDS), with_skill)


def test_detach_leaves_the_net_as_it_was(zoo):
    names, before = list(zoo.state_dict()), zoo(IDS)
    attach(zoo, trained(zoo, targets=TARGETS))
    detach(zoo)
    detach(zoo)
    assert list(zoo.state_dict()) == names
    assert torch.equal(zoo(IDS), before)
    with pytest.raises(ValueError, match="there is no skill on this net"):
        read(zoo)


def test_attaching_replaces_what_was_there():
    net = tiny_policy().net
    first, second = random_skill(net, seed=1), random_skill(net, rank=2, seed=2, modules=["enter", "leave.1"])
    attach(net, second)
    expected = net(*net_inputs())
    attach(net, first)
    attach(net, second)
    assert torch.equal(net(*net_inputs()), expected)
    assert read(net).fingerprint == second.fingerprint


def test_a_skill_that_is_folded_in_is_a_skill_that_is_attached(zoo):
    skill = trained(zoo, rank=3, targets=TARGETS)
    with_skill = zoo(IDS)
    detach(zoo)
    fold(zoo, skill)
    close(zoo(IDS), with_skill)


def test_a_skill_trained_on_a_folded_one_stands_on_it():
    net = tiny_policy().net
    first = random_skill(net, modules=["enter", "blocks.0.expand"])
    fold(net, first)
    second = trained(net, rank=2)
    expected = net(*net_inputs())
    plain = tiny_policy().net
    attach(plain, stack([first, second]))
    close(plain(*net_inputs()), expected)


def test_gpt2_conv1d_and_mixed_ranks():
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=20, bos_token_id=0, eos_token_id=0)
    net = GPT2LMHeadModel(config).eval()
    ids = torch.arange(12).reshape(2, 6)
    parts = [trained(net, rank=3, targets=["c_attn"]), trained(net, rank=2, targets=["c_attn", "c_proj", "c_fc"])]
    detach(net)
    plain = copy.deepcopy(net)
    attach(net, stack(parts, [0.5, -2.0]))
    with torch.no_grad():
        for name in stack(parts):
            plain.get_submodule(name).weight += sum(w * s.delta(name) for s, w in zip(parts, [0.5, -2.0], strict=True) if name in s).mT
    close(net(ids).logits, plain(ids).logits)


def test_reading_what_peft_put_there():
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    config = LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["0", "2"], rank_pattern={"2": 2}, alpha_pattern={"0": 9})
    peft = get_peft_model(net, config, adapter_name="mine")
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    skill = read(peft.base_model.model)
    x = torch.randn(3, 6)
    expected = peft(x)
    plain = peft.unload()
    attach(plain, skill)
    close(plain(x), expected)
    assert skill.ranks == {"0": 4, "2": 2}


@pytest.mark.parametrize(("options", "message"), [({"use_dora": True}, "'0' carries DoRA"), ({"lora_bias": True}, "'0' carries a LoRA bias")])
def test_variants_are_refused_by_name(options, message):
    peft = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(target_modules=["0"], **options))
    with pytest.raises(ValueError, match=message):
        read(peft.base_model.model)


def test_two_adapters_are_refused():
    peft = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(target_modules=["0"]))
    peft.add_adapter("other", LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"has the adapters \['default', 'other'\]"):
        read(peft.base_model.model)


def test_bad_targets_name_the_layer_and_change_nothing(zoo):
    names = list(zoo.state_dict())
    for targets, message in [
        ("nothing", "no module of the net matches targets='nothing'; it has 'words', 'conv'"),
        (["norm"], "'norm' is LayerNorm, which cannot carry B @ A"),
        (["grouped"], "'grouped' is a convolution with groups=2"),
    ]:
        with pytest.raises(ValueError, match=message):
            fresh(zoo, targets=targets)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        fresh(zoo, rank=0)
    assert list(zoo.state_dict()) == names


def test_skills_that_do_not_fit_are_refused_and_change_nothing(zoo):
    good = trained(zoo, targets=["linear.inner.0"])
    kept = zoo(IDS)
    for factors, embeddings, message in [
        ({"lost": (torch.ones(1, 6), torch.ones(5, 1))}, (), "no module 'lost' that the skill adapts"),
        ({"linear.inner.0": (torch.ones(1, 7), torch.ones(5, 1))}, (), r"is \(out, in\) \(5, \(6,\)\), the skill's factor is \(5, \(7,\)\)"),
        ({"norm": (torch.ones(1, 5), torch.ones(5, 1))}, (), "'norm' is LayerNorm"),
        ({"words": (torch.ones(1, 11), torch.ones(8, 1))}, (), "'words' is Embedding, which the skill does not take it for"),
    ]:
        with pytest.raises(ValueError, match=message):
            attach(zoo, Skill(factors, frozenset(embeddings)))
        with pytest.raises(ValueError, match=message):
            fold(zoo, Skill(factors, frozenset(embeddings)))
        assert torch.equal(zoo(IDS), kept)
    assert read(zoo).fingerprint == good.fingerprint


def test_base_weights_are_the_same_with_and_without_a_skill(zoo):
    before = base_weights(zoo, TARGETS)
    attach(zoo, trained(zoo, targets=TARGETS))
    after = base_weights(zoo, TARGETS)
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(ValueError, match="no modules 'lost'"):
        base_weights(zoo, ["lost"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_folding_comes_out_bit_for_bit(dtype):
    torch.manual_seed(0)
    net = tiny_policy().net.to(dtype)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    skills = [random_skill(net, rank=rank, seed=rank).to(dtype=torch.float32) for rank in (2, 3)]
    folding = Folding(net)
    first = None
    for _ in range(30):
        for skill in skills:
            folding.set(skill)
            folded = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        first = first or folded
        assert all(torch.equal(folded[name], first[name]) for name in folded)
        folding.clear()
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    name = next(iter(skills[1]))
    a, b = skills[1][name]
    assert torch.equal(first[f"{name}.weight"], (before[f"{name}.weight"].float() + b @ a).to(dtype))


def test_a_folding_is_a_context_and_refuses_what_does_not_fit():
    net = tiny_policy().net
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    skill = random_skill(net, rank=2)
    with Folding(net) as folding:
        folding.set(skill)
        changed = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        with pytest.raises(ValueError, match="the net has no module 'nowhere'"):
            folding.set(Skill({"nowhere": next(iter(skill.factors.values()))}))
        assert all(torch.equal(tensor, changed[name]) for name, tensor in net.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_what_a_folding_cannot_hold_is_refused():
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=20, bos_token_id=0, eos_token_id=0)
    net = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    head = Skill({"lm_head": (torch.randn(2, 16, generator=generator), torch.randn(50, 2, generator=generator))})
    for put in (Folding(net).set, lambda skill: fold(net, skill)):
        with pytest.raises(ValueError, match="module 'lm_head' shares its weight"):
            put(head)
    square = "transformer.h.0.attn.c_proj"
    skill = Skill({square: (torch.randn(2, 16, generator=generator), torch.randn(16, 2, generator=generator))})
    before = net.get_submodule(square).weight.detach().clone()
    ids = torch.arange(6)[None]
    with Folding(net) as folding:
        folding.set(skill)
        folded = net(ids).logits
    attach(net, skill)
    close(net(ids).logits, folded)
    with Folding(net) as folding:  # beside an adapter, on the layers below it
        folding.set(skill.scaled(-1.0))
        detach_and_compare = net(ids).logits
    detach(net)
    close(net(ids).logits, detach_and_compare, 1e-4)
    assert torch.equal(net.get_submodule(square).weight, before)


def test_a_folding_that_is_stopped_is_taken_out(monkeypatch):
    module = sys.modules["skillbank.folding"]
    net = tiny_policy().net
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    original, calls = module._add, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(*arguments)

    monkeypatch.setattr(module, "_add", stop)
    with pytest.raises(KeyboardInterrupt), Folding(net) as folding:
        folding.set(random_skill(net, rank=2))
    assert len(calls) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
