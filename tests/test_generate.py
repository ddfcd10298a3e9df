"""Text under a gate: prefill and decoding with a key-value cache, whatever computes the layers, are what full passes without one give."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from skillbank import Composed, MLPGate, Routes, Skill, Slots, TopK, check_model
from skillbank.attach import is_linear
from skillbank.mixture import Mixture
from skillbank.runtime.fused import fuse

LENGTH, VOCABULARY = 5, 31


class Text(nn.Module):
    """A `Model` around a causal language model: the loss of the next token, and the tokens that greedy or beam search goes on with."""

    def __init__(self, net, *, beams=1, cache=True, tokens=False):
        super().__init__()
        self.net, self.repeats, self.cache, self.tokens = net, beams, cache, tokens

    def forward(self, batch):
        return self.net(batch["input_ids"], labels=batch["input_ids"]).loss

    @torch.no_grad()
    def context(self, batch):
        words = self.net.get_input_embeddings()(batch["input_ids"])
        return words if self.tokens else words.mean(1)

    @torch.no_grad()
    def predict(self, batch):
        options = {"num_beams": self.repeats, "use_cache": self.cache, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        every = torch.ones_like(batch["input_ids"])
        return self.net.generate(batch["input_ids"], attention_mask=every, eos_token_id=None, **options)[:, LENGTH:]


def net_of(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
        net = GPT2LMHeadModel(config)
    else:
        heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        net = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, initializer_range=0.3, **heads))
    return net.double().eval()


def skills_of(net, count):
    skills = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        factors = {}
        for name, layer in net.named_modules():
            if is_linear(layer) and "head" not in name:
                out, width = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
                factors[name] = tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) / 2 for shape in ((2, width), (out, 2)))
        skills.append(Skill(factors))
    return skills


def composed(kind, path, **options):
    net = net_of(kind)
    skills = skills_of(net, 3)
    model = Text(net, **options)
    gate = MLPGate(16, 3, hidden=(8,)).double()
    torch.manual_seed(1)
    nn.init.normal_(gate.head.weight, std=3.0)
    if path == "slots":
        slots = Slots(net, 3, rank=2, modules=list(skills[0]))
        for slot, skill in enumerate(skills):
            slots.put(slot, skill)
        return Composed(model, TopK(gate, 2), slots)
    mixture = Mixture(net, skills)
    if path == "fused":
        assert fuse(net, mixture) == {}
    return Composed(model, TopK(gate, 2) if path == "routes" else gate, mixture)


BATCH = {"input_ids": torch.randint(VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(2))}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_every_path_says_the_same(kind):
    check_model(composed(kind, "fused"), BATCH)
    expected = composed(kind, "reference", cache=False).predict(BATCH)
    for cache in (True, False):
        assert torch.equal(composed(kind, "fused", cache=cache).predict(BATCH), expected)
    routed = composed(kind, "routes", cache=False).predict(BATCH)
    assert torch.equal(composed(kind, "slots").predict(BATCH), routed)
    assert not torch.equal(Text(net_of(kind)).predict(BATCH), expected)
    assert not torch.equal(routed, expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("path", ["reference", "fused", "slots"])
def test_a_batch_of_prompts_is_each_alone_with_beams_too(kind, path):
    for beams in (1, 3):
        model = composed(kind, path, beams=beams)
        together = model.predict(BATCH)
        for i in range(4):
            assert torch.equal(model.predict({"input_ids": BATCH["input_ids"][i : i + 1]}), together[i : i + 1])


@pytest.mark.parametrize("path", ["reference", "fused", "slots"])
def test_weights_per_token_train_but_do_not_generate(path):
    model = composed("llama", path, tokens=True)
    loss = model(BATCH)
    loss.backward()
    head = (model.gate.gate if path == "slots" else model.gate).head
    assert head.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"runs on rows and tokens \(4, 1\), the gate gave weights for \(4, 5\)"):
        model.predict(BATCH)


def test_beams_that_were_not_announced_are_refused():
    model = composed("llama", "fused", beams=3)
    model.model.repeats, beams = 1, model.model
    beams.predict = lambda batch: beams.net.generate(batch["input_ids"], num_beams=3, max_new_tokens=2, pad_token_id=0)
    with pytest.raises(ValueError, match="runs on 12 rows, the gate gave weights for 4: it must keep the batch"):
        model.predict(BATCH)


@pytest.mark.parametrize("path", ["reference", "fused", "slots"])
def test_gradient_checkpointing_gives_the_same_gradients(path):
    found = []
    for checkpointing in (False, True):
        model = composed("gpt2", path)
        if checkpointing:
            enable = getattr(model.net, "activation_checkpointing_enable", None) or model.net.gradient_checkpointing_enable
            enable()
            model.net.train()
            for layer in model.net.modules():
                if isinstance(layer, nn.Dropout):
                    layer.p = 0.0
        model(BATCH).backward()
        found.append([p.grad.clone() for p in model.gate.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert any(grad.abs().sum() > 0 for grad in found[0])


def test_a_copy_of_a_net_with_slots_has_slots_of_its_own():
    model = composed("llama", "slots")
    other = copy.deepcopy(model)
    expected = model.predict(BATCH)
    for slot in range(3):
        model.mixture.clear(slot)
    assert torch.equal(other.predict(BATCH), expected)
    assert not torch.equal(model.predict(BATCH), expected)
    assert isinstance(other.weights(BATCH), Routes)
