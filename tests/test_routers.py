"""Gates without training: against dense singular vectors and normal distributions, in the bank, per prompt and per token, behind a block."""

import copy

import pytest
import torch
from torch import nn

import skillbank as sb
from skillbank.layers import is_linear
from skillbank.mixture import Mixture
from skillbank.models.transformer import CausalLM
from skillbank.routers import Arrow, Prototypes
from skillbank.runtime.fused import fuse
from tests.test_generate import BATCH, LENGTH, NEW, VOCABULARY, greedily, net_of, skills_of, text
from tests.test_text import NETS
from tests.tiny import random_skill, tiny_batch, tiny_policy


def arrow(kind, path, skills, **options):
    net = net_of(kind)
    mixture = Mixture(net, skills)
    if path == "fused":
        fuse(net, mixture)
    return sb.Composed(text(net), Arrow(16, len(skills), **options), mixture)


def by_hand(kind, skills, k, temperature, *, without="head"):
    """The base, linear layers with the sum of B A x weighted by softmax over the k largest |v x|, v from dense singular values."""
    net = net_of(kind)
    for name, layer in list(net.named_modules()):
        if not is_linear(layer) or "head" in name or without in name:
            continue
        deltas = [skill.delta(name) if name in skill else None for skill in skills]
        vectors = [None if delta is None else torch.linalg.svd(delta).Vh[0] for delta in deltas]

        def hook(layer, inputs, output, deltas=deltas, vectors=vectors):
            (x,) = inputs
            scores = torch.stack([torch.full_like(x[..., 0], -torch.inf) if v is None else (x @ v).abs() for v in vectors], -1)
            least = scores.topk(k).values[..., -1:]
            weights = (scores.masked_fill(scores < least, -torch.inf) / temperature).softmax(-1).nan_to_num(0)
            return output + sum(weights[..., i, None] * (x @ delta.mT) for i, delta in enumerate(deltas) if delta is not None)

        layer.register_forward_hook(hook)
    return net


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_of_a_base_that_looks_behind_a_block_the_blocks_before_stay_the_base(kind):
    skills = skills_of(net_of(kind), 2)
    model, expected = arrow(kind, "reference", skills, k=1), by_hand(kind, skills, 1, 1.0, without=".0.")
    model.model.layer = 1
    ids = BATCH["input_ids"]
    logits = expected(ids).logits
    torch.testing.assert_close(model({"input_ids": ids}), nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    assert torch.equal(model.context({"input_ids": ids}), text(net_of(kind), layer=1).context({"input_ids": ids}))
    said = expected.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(model.predict({"input_ids": ids}), said[:, LENGTH:])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("path", ["reference", "fused"])
@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (2, 0.3), (3, 1.0)])
def test_every_layer_weights_what_its_skills_amplify(kind, path, k, temperature):
    net = net_of(kind)
    skills = skills_of(net, 3)
    skills[1] = skills[1].part(list(skills[1])[::2])  # not in every module
    model, expected = arrow(kind, path, skills, k=k, temperature=temperature), by_hand(kind, skills, k, temperature)
    ids = BATCH["input_ids"]
    loss = model({"input_ids": ids})
    logits = expected(ids).logits
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), rtol=1e-10, atol=0)
    torch.testing.assert_close(model.net(ids).logits, logits, rtol=1e-9, atol=1e-10)
    said = ids
    with torch.no_grad():
        for _ in range(NEW):
            said = torch.cat([said, expected(said).logits[:, -1:].argmax(-1)], 1)
    for cache in (True, False):
        model.model.generation["use_cache"] = cache
        assert torch.equal(model.predict(BATCH), said[:, LENGTH:])
    padded = {"input_ids": ids[:1], "attention_mask": torch.tensor([[1, 1, 0, 0, 0]])}
    torch.testing.assert_close(torch.tensor(model.shown(padded)), torch.tensor(model.shown({"input_ids": ids[:1, :2]})))
    shown = model.shown(BATCH)
    assert shown.shape == (4, 3)
    assert (shown >= 0).all()
    assert (shown.sum(1) < 1 + 1e-5).all()


def test_where_arrow_looks_moves_with_the_model():
    model = arrow("llama", "reference", skills_of(net_of("llama"), 3))
    state, other = set(model.state_dict()), copy.deepcopy(model)
    other.to("meta").mixture.cell.mix({})
    assert other.net(BATCH["input_ids"].to("meta")).logits.is_meta
    assert not [name for name in state if "directions" in name]
    assert torch.equal(model.predict(BATCH), copy.deepcopy(model).predict(BATCH))


def test_arrow_in_the_bank(tmp_path):
    torch.manual_seed(0)
    conf = {"_target_": "skillbank.models.transformer.CausalLM", "net": {"model_type": "llama", "vocab_size": VOCABULARY, **NETS["llama"]}}
    model = CausalLM(conf["net"]).eval()
    bank = sb.Bank(tmp_path)
    bank.put(sb.Base(conf, model.state_dict()), "base")
    inside = [name for name, layer in model.net.named_modules() if is_linear(layer) and name != "lm_head"]
    for seed in range(3):
        bank.put(random_skill(model.net, modules=inside, seed=seed, size=0.3), f"s{seed}", card={"base": "base"})
    gate = {"_target_": "skillbank.routers.Arrow", "context_dim": 16, "skills": 3, "k": 2}
    bank.put(sb.Composition("base", ["s0", "s1", "s2"], gate=gate), "arrow")
    loaded = sb.load("arrow", bank)
    assert {choice.kind for choice in loaded.plan.values()} == {"factors"}
    live = sb.Composed(copy.deepcopy(model), Arrow(16, 3, k=2), [bank.get(f"s{i}") for i in range(3)])
    torch.testing.assert_close(loaded(BATCH), live(BATCH), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(loaded(BATCH), model(BATCH))


def test_the_nearest_prototype_is_the_likeliest():
    torch.manual_seed(0)
    deviation = torch.rand(5, dtype=torch.float64) + 0.2
    places = torch.randn(3, 5, dtype=torch.float64)
    samples = [place + torch.randn(4000, 5, dtype=torch.float64) * deviation for place in places]
    gate = Prototypes(5, 3).double()
    gate.place(samples)
    pooled = torch.cat([each - each.mean(0) for each in samples]).square().mean(0).sqrt()
    torch.testing.assert_close(gate.deviation, pooled)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    logs = torch.stack([torch.distributions.Normal(each.mean(0), pooled).log_prob(x).sum(-1) for each in samples], -1)
    torch.testing.assert_close(gate(x), logs.softmax(-1), rtol=1e-9, atol=1e-12)
    gate.k = 1
    assert torch.equal(gate(x), nn.functional.one_hot(logs.argmax(-1), 3).double())
    gate.k, gate.temperature = 2, 0.5
    two = gate(x)
    assert ((two > 0).sum(-1) == 2).all()
    torch.testing.assert_close(two.sum(-1), torch.ones(2, 7, dtype=torch.float64))


def test_weights_by_prototypes_do_not_depend_on_the_rows_beside_them():
    """Nor on how far all contexts are from 0."""
    generator = torch.Generator().manual_seed(0)
    samples = [300 + shift + torch.randn(200, 64, generator=generator) for shift in (0, 0.5)]
    gate = Prototypes(64, 2)
    gate.place(samples)
    rows = torch.cat([sample[:40] for sample in samples])
    together = gate(rows)
    assert torch.equal(together, torch.cat([gate(row) for row in rows.split(1)]))
    torch.testing.assert_close(together, copy.deepcopy(gate).double()(rows.double()).float(), rtol=0, atol=1e-4)


def test_prototypes_route_observations_to_their_skill():
    """Nothing about them is of language."""
    policy = tiny_policy()
    skills = [random_skill(policy.net, seed=seed) for seed in range(2)]
    near, far = tiny_batch()["observation"] - 3, tiny_batch()["observation"] + 3
    gate = Prototypes(5, 2, k=1)
    gate.place([near, far])
    model = sb.Composed(policy, gate, skills)
    assert model.shown({"observation": near}).argmax(1).tolist() == [0] * 6
    assert model.shown({"observation": far}).argmax(1).tolist() == [1] * 6


def test_a_gate_says_what_it_wants_to_see(tmp_path):
    net = net_of("llama")
    gate = sb.MLPGate(16, 3, hidden=(8,), view={"tokens": True, "layer": 1}).double()
    nn.init.normal_(gate.head.weight)
    model = sb.Composed(text(net), gate, skills_of(net, 3))
    assert (model.model.tokens, model.model.layer) == (True, 1)
    assert model.weights(BATCH).shape == (4, LENGTH, 3)
    assert sb.grow(gate).view == sb.Growing(gate).view == sb.TopK(gate, 1).view == gate.view
    plain = sb.MLPGate(16, 3, hidden=(8,), view={"tokens": True}).double()
    plain.load_state_dict(gate.state_dict())
    again = sb.Composed(text(net_of("llama")), plain, skills_of(net_of("llama"), 3))
    assert torch.equal(again.predict(BATCH), greedily(again, BATCH["input_ids"]))
    with pytest.raises(ValueError, match=r"the gate is to see tokens=True, DiffusionPolicy has no 'tokens': leave it out of the gate's view"):
        sb.Composed(tiny_policy(), sb.MLPGate(5, 1, view={"tokens": True}), [random_skill(tiny_policy().net)])


def test_bad_input():
    with pytest.raises(
        ValueError, match=r"prototypes: k must be 1 to 2, the number of skills, and the temperature above 0, got k=3, temperature=1.0"
    ):
        Prototypes(5, 2, k=3)
    with pytest.raises(ValueError, match=r"arrow: k must be 1 to 2, .* got k=2, temperature=0"):
        Arrow(5, 2, temperature=0)
    net = net_of("llama")
    skills = skills_of(net, 2)
    with pytest.raises(ValueError, match="Arrow weights in the layers, where TopK cannot choose: give it its own k=1"):
        sb.TopK(Arrow(16, 2), 1)
    with pytest.raises(ValueError, match="Arrow weights in the layers, which regulariser='mean' does not see: leave it out"):
        sb.Composed(text(net), Arrow(16, 2), skills, regulariser="mean")
    slots = sb.Slots(net, 2, rank=2, modules=list(skills[0]))
    with pytest.raises(ValueError, match="arrow looks at the skills once, those in Slots come and go: give Composed the skills themselves"):
        sb.Composed(text(net), Arrow(16, 2), slots)
    with pytest.raises(ValueError, match="prototypes of 2 skills need as many samples of contexts, got 1"):
        Prototypes(5, 2).place([torch.zeros(3, 5)])
