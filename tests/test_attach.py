import copy
import sys
from itertools import count

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from skillbank import Folding, Skill, Slots, attach, dense_merge, detach, fit, fold, fresh, read, stack, write_adapter
from skillbank.attach import base_weights
from skillbank.runtime.fused import fuse
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "'0' carries DoRA"),
        ({"lora_bias": True}, "'0' carries a LoRA bias"),
        ({"alora_invocation_tokens": [1]}, "'0' carries PEFT's ALoraLinearVariant, which B @ A cannot represent"),
    ],
)
@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
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
        (["conv", "con"], "no module of the net matches targets='con'; it has"),
        ([], r"no module of the net matches targets=\[\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            fresh(zoo, targets=targets)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        fresh(zoo, rank=0)
    assert list(zoo.state_dict()) == names


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), "'0' is a convolution with padding_mode='circular'"),
        (nn.Conv2d(4, 4, 3, dilation=2), r"'0' is a convolution with .* dilation=\(2, 2\)"),
        (nn.Embedding(7, 4, max_norm=1.0), "'0' is an embedding with max_norm"),
        (nn.MultiheadAttention(4, 2).out_proj, "'0' is the output of nn.MultiheadAttention, which reads its weight and never runs it"),
    ],
)
def test_layers_whose_skill_would_compute_something_else_are_refused(layer, message):
    with pytest.raises(ValueError, match=message):
        fresh(nn.Sequential(layer), targets=["0"])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_encoder_runs_its_adapted_layers():
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=True).eval()
    modules = [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    skill, x, padding = random_skill(net, modules=modules, size=1.0), torch.randn(2, 5, 8), torch.arange(5) > torch.tensor([[4], [2]])
    folded, slots = copy.deepcopy(net), copy.deepcopy(net)
    fold(folded, skill)
    attach(net, skill)
    made = Slots(slots, 2, rank=4)
    made.put(1, skill)
    made.cell.mix(torch.tensor([[0.0, 1.0]]).expand(2, -1))
    assert made.names == modules
    for mask in (torch.zeros_like(padding), padding):
        with torch.no_grad():
            expected = folded(x, src_key_padding_mask=mask)[~mask]
            close(net(x, src_key_padding_mask=mask)[~mask], expected)
            close(slots(x, src_key_padding_mask=mask)[~mask], expected)


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


def test_a_merge_that_fails_on_the_way_leaves_the_weights_as_they_were():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = copy.deepcopy(net.state_dict())
    one, other = (random_skill(net, seed=seed)["0"] for seed in range(2))
    first, last = (Skill({"0": each, "1": (torch.eye(4), sign * torch.eye(4))}) for each, sign in ((one, 1.0), (other, -1.0)))
    cancels = dense_merge([first, last], method="karcher")
    with pytest.raises(ValueError, match="the skills cancel, so that their mean has no direction"):
        fold(net, cancels)
    assert all(torch.equal(weight, before[name]) for name, weight in net.state_dict().items())
    folding = Folding(net)
    folding.set(first)
    folded = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="the skills cancel, so that their mean has no direction"):
        folding.set(cancels)
    assert all(torch.equal(weight, folded[name]) for name, weight in net.state_dict().items())
    folding.clear()
    assert all(torch.equal(weight, before[name]) for name, weight in net.state_dict().items())


def test_a_weight_that_is_computed_is_not_folded_into():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="module '0' has a weight that is computed from others"):
        fold(net, Skill({"0": (torch.randn(2, 4), torch.randn(4, 2))}))


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


INITS = ["pissa", "pissa_niter_8", "olora"]


def small(kind):
    """A net whose base has a singular value apart from the others, so that power iterations find the largest."""
    torch.manual_seed(3)
    if kind == "gpt2":
        config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=20, bos_token_id=0, eos_token_id=0, initializer_range=0.3)
        return GPT2LMHeadModel(config).eval().requires_grad_(False)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).requires_grad_(False)


def inputs(kind):
    generator = torch.Generator().manual_seed(4)
    return torch.randint(50, (3, 6), generator=generator) if kind == "gpt2" else torch.randn(8, 6, generator=generator)


def said(net, kind):
    return net(inputs(kind)).logits if kind == "gpt2" else net(inputs(kind))


def steps_of(net, params, kind, count=5):
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
    for _ in range(count):
        optimizer.zero_grad()
        said(net, kind).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", ["linear", "gpt2"])
@pytest.mark.parametrize("fused", [False, True])
def test_factors_that_start_in_the_weights_leave_the_base_as_it_is(kind, init, fused):
    net = small(kind)
    before, plain = {name: tensor.clone() for name, tensor in net.state_dict().items()}, said(net, kind)
    params = fresh(net, rank=2, scale=2.0, init=init)
    again = fresh(copy.deepcopy(net), rank=2, scale=2.0, init=init)
    assert all(torch.equal(one, other) for one, other in zip(params, again, strict=True))
    if fused:
        assert fuse(net) == {}
    close(said(net, kind), plain)
    assert max(float((read(net).delta(name)).abs().max()) for name in read(net)) < 1e-6
    steps_of(net, params, kind)
    trained, skill = said(net, kind), read(net)
    assert not torch.allclose(trained, plain, rtol=1e-3, atol=1e-3)
    close(said(copy.deepcopy(net), kind), trained)
    assert set(skill.ranks.values()) == {4}
    names = list(skill)
    assert all(torch.equal(before[name], tensor) for name, tensor in base_weights(net, names).items())
    detach(net)
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert torch.equal(said(net, kind), plain)
    attach(net, skill)
    close(said(net, kind), trained)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:fan_in_fan_out")  # of transformers about itself, of PEFT about Conv1D
@pytest.mark.parametrize(("kind", "init"), [("linear", "pissa"), ("linear", "olora"), ("linear", "pissa_niter_8"), ("gpt2", "pissa")])
def test_factors_that_start_in_the_weights_train_as_those_of_peft(tmp_path, kind, init):
    net, rank, scale = small(kind), 2, 3.0
    targets = ["0", "2"] if kind == "linear" else ["c_attn", "c_proj", "c_fc"]
    config = LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=targets, init_lora_weights=init)
    oracle = get_peft_model(small(kind), config)
    steps_of(oracle, [p for p in oracle.parameters() if p.requires_grad], kind)
    params = fresh(net, rank=rank, scale=scale, targets=targets, init=init)
    assert params[0].shape[0] == rank
    steps_of(net, params, kind)
    close(said(net, kind), said(oracle, kind), 1e-3 if "niter" in init else 1e-4)
    write_adapter(read(net), tmp_path)
    close(said(PeftModel.from_pretrained(small(kind), tmp_path), kind), said(net, kind), 1e-4)


@pytest.mark.parametrize("init", INITS)
def test_a_killed_run_from_the_weights_resumes_to_the_last_bit(tmp_path, init):
    def run(folder, last=None):
        policy = tiny_policy(dropout=0.1)

        def batches(start):
            for step in count(start):
                if step == last:
                    raise KeyboardInterrupt
                generator = torch.Generator().manual_seed(step)
                yield {"observation": torch.randn(8, 5, generator=generator), "action": torch.rand(8, 1, 3, generator=generator) * 2 - 1}

        params = fresh(policy.net, rank=2, scale=1.0, init=init)
        return policy, fit(policy, batches, params, steps=8, lr=1e-2, checkpoint_every=3, log_every=1, folder=folder, progress=False)

    policy, whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", last=5)
    torch.manual_seed(1)  # whatever has been drawn since
    again, resumed = run(tmp_path / "killed")
    assert resumed.rows == whole.rows
    assert read(again.net).fingerprint == read(policy.net).fingerprint


def test_starts_that_there_are_not(zoo):
    names = list(zoo.state_dict())
    for options, message in [
        ({"init": "gaussian"}, "init is pissa, pissa_niter_<N> or olora, with a scale above 0, or None .*; got 'gaussian' with scale=16"),
        ({"init": "pissa", "scale": 0.0}, "got 'pissa' with scale=0.0"),
        ({"init": "pissa", "targets": TARGETS}, "init='pissa' is for linear layers of floating point, module 'words' is Embedding: leave it out"),
        ({"init": "olora", "rank": 6}, "init='olora' finds 5 directions in module 'linear.inner.0', not rank=6: lower it, or leave the module out"),
    ]:
        with pytest.raises(ValueError, match=message):
            fresh(zoo, **options)
        assert list(zoo.state_dict()) == names
