"""Text under a gate: prefill and decoding with a key-value cache, whatever computes the layers, are what full passes without one give."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from skillbank import Bank, Base, Composed, Composition, MLPGate, Routes, Server, Skill, Slots, Together, TopK, check_model, fit, fresh, load, read
from skillbank.kshot import losses_of
from skillbank.layers import is_linear
from skillbank.learn import Weighted
from skillbank.mixture import Mixture
from skillbank.models.transformer import CausalLM
from skillbank.runtime.fused import fuse

LENGTH, NEW, VOCABULARY = 5, 6, 31


def text(net, *, beams=1, cache=True, tokens=False, layer=None):
    options = {"num_beams": beams, "use_cache": cache, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return CausalLM(net, tokens=tokens, layer=layer, generation=options)


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
    model = text(net, **options)
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
    assert not torch.equal(text(net_of(kind)).predict(BATCH), expected)
    assert not torch.equal(routed, expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("path", ["reference", "fused", "slots"])
def test_a_batch_of_prompts_is_each_alone_with_beams_too(kind, path):
    for beams in (1, 3):
        model = composed(kind, path, beams=beams)
        together = model.predict(BATCH)
        for i in range(4):
            assert torch.equal(model.predict({"input_ids": BATCH["input_ids"][i : i + 1]}), together[i : i + 1])


def greedily(model, ids):
    """New tokens, every one from a full pass under the weights of every token."""
    for _ in range(NEW):
        model.mixture.cell.mix(model.weights({"input_ids": ids}))
        with torch.no_grad():
            logits = model.net(ids).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[:, LENGTH:]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("path", ["reference", "fused", "slots"])
def test_weights_per_token_train_and_generate(kind, path):
    model = composed(kind, path, tokens=True)
    model(BATCH).backward()
    head = (model.gate.gate if path == "slots" else model.gate).head
    assert head.weight.grad.abs().sum() > 0
    expected = greedily(model, BATCH["input_ids"])
    for cache in (True, False):
        model.model.generation["use_cache"] = cache
        assert torch.equal(model.predict(BATCH), expected)
    assert not torch.equal(composed(kind, path).predict(BATCH), expected)
    model.model.generation["num_beams"] = 3
    together = model.predict(BATCH)
    for i in range(4):
        assert torch.equal(model.predict({"input_ids": BATCH["input_ids"][i : i + 1]}), together[i : i + 1])


def behind_a_block(model, ids):
    """Logits where the base alone runs up to a block, what is there is the context, and the skills work behind it."""
    model.mixture.cell.mix(torch.zeros(len(ids), 3, dtype=torch.float64))
    hidden = model.net(ids, output_hidden_states=True).hidden_states[1]
    context = hidden if model.model.tokens else hidden[:, :LENGTH].mean(1)
    weights = model.gate(context)
    nothing = torch.zeros_like(weights)
    modules = [name for name, _ in model.net.named_modules() if name.endswith(("c_attn", "c_proj", "c_fc", "_proj"))]
    model.mixture.cell.mix({name: nothing if ".0." in name else weights for name in modules})
    return model.net(ids).logits


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("path", ["reference", "fused"])
def test_what_a_gate_sees_after_a_block_comes_about_in_the_pass(kind, tokens, path):
    model = composed(kind, path, tokens=tokens, layer=1)
    ids, seen = BATCH["input_ids"], []
    blocks = next(module for module in model.net.modules() if isinstance(module, nn.ModuleList))
    for block in blocks:
        block.register_forward_hook(lambda *_: seen.append(1))
    expected = ids
    with torch.no_grad():
        for _ in range(NEW):
            expected = torch.cat([expected, behind_a_block(model, expected)[:, -1:].argmax(-1)], 1)
    del seen[:]
    assert torch.equal(model.predict(BATCH), expected[:, LENGTH:])
    assert len(seen) == NEW * len(blocks)
    model.model.generation["use_cache"] = False
    assert torch.equal(model.predict(BATCH), expected[:, LENGTH:])
    model.model.generation.update(use_cache=True, num_beams=3)
    together = model.predict(BATCH)
    for i in range(4):
        assert torch.equal(model.predict({"input_ids": ids[i : i + 1]}), together[i : i + 1])
    del seen[:]
    loss = model({"input_ids": ids})
    assert len(seen) == len(blocks)
    logits = behind_a_block(model, ids)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), rtol=1e-12, atol=0)
    loss.backward()
    assert model.gate.head.weight.grad.abs().sum() > 0
    weights = model.weights(BATCH)
    model.predict(BATCH)
    if not tokens:
        torch.testing.assert_close(model.mixture.cell.weights[::3], weights, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("view", [{}, {"tokens": True}, {"layer": 1}, {"layer": 1, "tokens": True}])
def test_the_net_by_itself_runs_under_the_gate_while_it_is_live(kind, view):
    model = composed(kind, "fused", **view)
    expected, ids = model.predict(BATCH), BATCH["input_ids"]
    with model.live():
        assert torch.equal(model.net.generate(ids, **model.model.generation)[:, LENGTH:], expected)
        logits = model.net(ids).logits
    loss = model({"input_ids": ids})
    assert view or torch.allclose(loss, nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    assert not model.net._forward_pre_hooks


@pytest.mark.parametrize("path", ["reference", "fused", "slots"])
def test_the_context_behind_a_block_is_the_base_whatever_ran_before(path):
    model, expected = composed("llama", path, layer=1), text(net_of("llama"), layer=1).context(BATCH)
    for _ in range(2):
        torch.testing.assert_close(model.context(BATCH), expected, rtol=1e-12, atol=1e-14)
        model.predict(BATCH)
    weighted = Weighted(text(net_of("llama"), layer=1), skills_of(net_of("llama"), 2))
    torch.testing.assert_close(weighted.context(BATCH), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("path", ["reference", "slots"])
@pytest.mark.parametrize("view", [{}, {"tokens": True}, {"layer": 1}])
def test_losses_of_rows_under_a_gate(path, view):
    model = composed("llama", path, **view)
    losses, loss = model.losses(BATCH), model(BATCH)
    alone = [model.losses({"input_ids": row[None]}) for row in BATCH["input_ids"]]
    torch.testing.assert_close(losses, torch.cat(alone), rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.mean(), loss, rtol=1e-6, atol=0)
    model.regulariser = "mean"
    assert torch.equal(model.losses(BATCH), losses)
    for use in (lambda: Together(model, [0, 1]), lambda: losses_of(model, skills_of(net_of("llama"), 2), [BATCH])):
        with pytest.raises(ValueError, match=r"Composed has skills on its net, .*: give the base by itself"):
            use()
    model.model = nn.ModuleDict({"net": model.net})
    assert not hasattr(model, "losses")


def test_a_gate_looks_after_a_block_that_there_is():
    for layer in (0, 2):
        with pytest.raises(ValueError, match=f"a gate can look after 1 to 1 of the 2 blocks, got layer={layer}"):
            composed("llama", "fused", layer=layer).predict(BATCH)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("path", ["reference", "fused", "slots"])
def test_prompts_of_other_lengths_go_on_as_they_do_alone(path, tokens):
    model = composed("llama", path, tokens=tokens)
    lengths, ids = [5, 2, 4, 1], BATCH["input_ids"]
    right = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    left = {"input_ids": torch.stack([row.roll(LENGTH - length) for row, length in zip(ids, lengths, strict=True)]), "attention_mask": right.flip(1)}
    answered = {"input_ids": ids, "labels": ids.masked_fill(right, -100)}
    alone = torch.cat([model.predict({"input_ids": ids[i : i + 1, :length]}) for i, length in enumerate(lengths)])
    for batch in ({"input_ids": ids, "attention_mask": right}, left, answered):
        assert torch.equal(model.predict(batch), alone)
    if not tokens:
        expected = torch.cat([model.context({"input_ids": ids[i : i + 1, :length]}) for i, length in enumerate(lengths)])
        torch.testing.assert_close(model.context(answered), expected)


@pytest.mark.parametrize("given", [False, True])
def test_without_a_padding_token_rows_are_filled_with_the_first_of_several_ends(given):
    model = text(net_of("llama"))
    said = model.predict(BATCH)
    first, end = said[0, 1:3].tolist()
    assert first != end
    config = model.net.generation_config
    config.eos_token_id, config.pad_token_id = ([end + 1, 0], None) if given else ([first, end], None)
    model.generation.pop("pad_token_id")
    model.generation.pop("eos_token_id")
    if given:
        model.generation["eos_token_id"] = [first, end]
    filled = model.predict(BATCH)
    for row, whole in zip(filled.tolist(), said.tolist(), strict=True):
        over = min((i for i, token in enumerate(whole) if token in (first, end)), default=NEW)
        assert row == whole[: over + 1] + [first] * (NEW - over - 1)
    assert filled[0].tolist() == said[0, :2].tolist() + [first] * (NEW - 2)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_loss_is_that_of_transformers_row_by_row(kind):
    model = text(net_of(kind))
    ids = BATCH["input_ids"]
    labels = ids.masked_fill(torch.arange(LENGTH) < torch.tensor([3, 0, 4, 1])[:, None], -100)
    expected = torch.stack([model.net(ids[i : i + 1], labels=labels[i : i + 1]).loss for i in range(4)])
    torch.testing.assert_close(model.losses({"input_ids": ids, "labels": labels}), expected.double(), rtol=1e-6, atol=0)
    mask = torch.arange(LENGTH) < torch.tensor([5, 4, 3, 2])[:, None]
    shorter = [model.net(ids[i : i + 1, : 5 - i], labels=ids[i : i + 1, : 5 - i]).loss for i in range(4)]
    torch.testing.assert_close(model({"input_ids": ids, "attention_mask": mask}), torch.stack(shorter).double().mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("path", ["reference", "slots"])
@pytest.mark.parametrize("view", [{"tokens": True}, {"tokens": True, "layer": 1}])
def test_padding_counts_neither_in_what_is_shown_nor_in_the_regulariser(path, view):
    model, row = composed("llama", path, **view), BATCH["input_ids"][:1]
    alone, padded = {"input_ids": row[:, :3]}, {"input_ids": row, "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    packed = {"input_ids": row, "segments": torch.tensor([[1, 1, 1, 0, 0]])}
    for regulariser in ("mean", "code"):
        model.regulariser = regulariser
        for batch in (padded, packed):
            torch.testing.assert_close(torch.tensor(model.shown(batch)), torch.tensor(model.shown(alone)))
            torch.testing.assert_close(model(batch), model(alone))
    assert abs(model.shown({"input_ids": row}) - model.shown(alone)).max() > 1e-3


@pytest.mark.filterwarnings("ignore")  # of torch about itself
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_padding_on_the_left_changes_no_loss(kind):
    model, ids, lengths = text(net_of(kind), layer=1), BATCH["input_ids"], [5, 2, 4, 3]
    compiled = text(net_of(kind))
    torch._dynamo.reset()
    compiled.net.compile(backend="eager", fullgraph=True, dynamic=False)
    mask = (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill((mask == 0) | (torch.arange(LENGTH) == 2), -100)
    for right in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids, "attention_mask": mask, "labels": labels}):
        left = {key: torch.stack([row.roll(LENGTH - n) for row, n in zip(value, lengths, strict=True)]) for key, value in right.items()}
        alone = [model.losses({key: value[i : i + 1, :n] for key, value in right.items()}) for i, n in enumerate(lengths)]
        for found in (model.losses(right), model.losses(left), compiled.losses(left)):
            torch.testing.assert_close(found, torch.cat(alone), rtol=1e-6, atol=0)
        torch.testing.assert_close(model.context(left), model.context(right))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "opt", "roberta", "xlm-roberta"])
def test_what_is_generated_is_what_the_net_computes_or_the_net_is_refused(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCABULARY, "word_embed_proj_dim": 16}
    spread = {"initializer_range": 0.3, "init_std": 0.3, "pad_token_id": 1, "eos_token_id": None, "bos_token_id": None}
    config = {"model_type": kind, "is_decoder": True, **sizes, **spread}
    if "roberta" in kind:
        with pytest.raises(ValueError, match=r"ForCausalLM does not generate what it computes: .* take a net that is made to go on with text"):
            CausalLM(config)
        return
    model = CausalLM(config).eval()
    ids = BATCH["input_ids"]
    found = torch.cat([ids, model.predict({"input_ids": ids}, max_new_tokens=5)], dim=1)
    assert torch.equal(found[:, ids.shape[1] :], model.net(found).logits.argmax(-1)[:, ids.shape[1] - 1 : -1])
    losses = model.losses({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    torch.testing.assert_close(losses, torch.stack([model.net(ids[i : i + 1], labels=ids[i : i + 1]).loss for i in range(len(ids))]).detach())


@pytest.mark.filterwarnings("ignore")  # of torch about itself
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("path", ["reference", "fused", "slots"])
def test_a_compiled_net_goes_on_with_other_weights(path, tokens):
    model = composed("llama", path, tokens=tokens)
    expected = model.predict(BATCH)
    torch._dynamo.reset()
    counter = CompileCounter()
    model.model.generation |= {"cache_implementation": "static", "disable_compile": True}
    model.net.compile(backend=counter, fullgraph=True, dynamic=False)
    assert torch.equal(model.predict(BATCH), expected)
    seen = counter.frame_count
    with torch.no_grad():
        for p in model.gate.parameters():
            p.mul_(-1)
    assert not torch.equal(model.predict(BATCH), expected)
    frames = 2 * (1 + tokens) + (path != "reference" and not tokens)  # prompt and next token; the gate's; what is made of weights that stay
    assert counter.frame_count == seen == frames


@pytest.mark.filterwarnings("ignore")  # of torch about itself
def test_a_gate_that_trains_compiled():
    found = []
    for compiled in (False, True):
        model = composed("llama", "fused", tokens=True)
        rows = fit(model, lambda start: iter([BATCH] * 3), model.gate.parameters(), steps=3, log_every=1, compile=compiled, progress=False).rows
        found.append(torch.tensor([row["loss"] for row in rows]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)
    assert found[0][2] < found[0][0]


def test_skills_of_a_transformer_that_train_at_once_are_those_that_train_alone():
    rows = torch.randint(VOCABULARY, (3, 4, LENGTH), generator=torch.Generator().manual_seed(3))
    options = {"steps": 3, "log_every": 1, "progress": False, "ema": None, "lr": 1e-2}
    alone = []
    for seed in range(3):
        model = text(net_of("gpt2"))  # with dropout
        torch.manual_seed(seed)
        params = fresh(model.net, rank=2)
        fit(model, lambda start, seed=seed: iter([{"input_ids": rows[seed]}] * 3), params, seed=seed, **options)
        alone.append(read(model.net))
    together = Together(text(net_of("gpt2")), [0, 1, 2], ranks=2)
    fit(together, lambda start: iter([{"input_ids": rows.flatten(0, 1)}] * 3), together.groups(), seed=0, **options)
    for k, skill in enumerate(alone):
        found = together.read(k)
        for name in skill:
            torch.testing.assert_close(found.delta(name), skill.delta(name), rtol=1e-6, atol=1e-9)
        assert max(float(skill.delta(name).abs().max()) for name in skill) > 1e-3


@pytest.fixture
def bank(tmp_path):
    bank = Bank(tmp_path)
    config = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "initializer_range": 0.3}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    generation = {"max_new_tokens": NEW, "do_sample": True, "pad_token_id": 0, "eos_token_id": None}
    conf = {"_target_": "skillbank.models.transformer.CausalLM", "net": config, "generation": generation}
    torch.manual_seed(0)
    model = CausalLM(config, generation=generation)
    base = bank.put(Base(conf, model.state_dict()), "base")
    for k, skill in enumerate(skills_of(model.net, 3)):
        single = Skill({name: (a.float(), b.float()) for name, (a, b) in skill.factors.items()})
        bank.put(single, f"skill-{k}", card={"base": base})
    torch.manual_seed(1)
    gate = MLPGate(16, 2)
    nn.init.normal_(gate.head.weight, std=3.0)
    gate_conf = {"_target_": "skillbank.MLPGate", "context_dim": 16, "skills": 2}
    for name, view in {"gated": {}, "plain": {"tokens": False, "layer": None}, "tokens": {"tokens": True}, "layer": {"layer": 1}}.items():
        bank.put(Composition("base", ("skill-0", "skill-2"), gate={**gate_conf, "view": view}, tensors=gate.state_dict()), name)
    bank.put(Composition("base", ("skill-0", "skill-2"), gate={**gate_conf, "_target_": "skillbank.routers.Arrow"}), "arrow")
    return bank


def test_many_versions_in_one_batch_say_what_each_says_alone(bank):
    refs = ["gated", "skill-1", "base", "plain"]
    found = Server("base", bank, slots=2, rank=2).predict(BATCH, refs, seeds=[5, 6, 7, 5])
    for i, ref in enumerate(refs):
        model = load(ref, bank)
        torch.manual_seed([5, 6, 7, 5][i])
        assert torch.equal(model.predict({"input_ids": BATCH["input_ids"][i : i + 1]}), found[i : i + 1])


@pytest.mark.parametrize(
    ("ref", "why"), [("tokens", "sees {'tokens': True}"), ("layer", "sees {'layer': 1}"), ("arrow", "weights every token or layer by itself")]
)
def test_a_gate_that_cannot_share_a_batch_is_refused_by_name(bank, ref, why):
    server = Server("base", bank, slots=2, rank=2)
    with pytest.raises(ValueError, match=f"the gate of '{ref}@1' {why}, so its rows cannot share a batch with others: load this version by itself"):
        server.predict(BATCH, [ref, "base", "base", "base"])
    assert load(ref, bank).predict(BATCH).shape == (4, NEW)


def test_beams_that_were_not_announced_are_refused():
    model = composed("llama", "fused", beams=3)
    beams = model.model
    beams.predict = lambda batch: beams.net.generate(batch["input_ids"], num_beams=3, max_new_tokens=2, pad_token_id=0)
    beams.generation["num_beams"] = 1
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


@pytest.mark.parametrize("path", ["reference", "fused", "routes", "slots"])
@pytest.mark.parametrize("view", [{}, {"tokens": True}, {"layer": 1}])
def test_a_composition_that_trains_can_be_copied(path, view):
    model = composed("llama", path, **view)
    model(BATCH).backward()
    other = copy.deepcopy(model)
    assert torch.equal(other(BATCH), model(BATCH))
    head = (model.gate.gate if path in ("routes", "slots") else model.gate).head
    with torch.no_grad():
        head.weight.zero_()
    assert not torch.equal(other(BATCH), model(BATCH))


def test_a_copy_of_a_net_with_slots_has_slots_of_its_own():
    model = composed("llama", "slots")
    other = copy.deepcopy(model)
    expected = model.predict(BATCH)
    for slot in range(3):
        model.mixture.clear(slot)
    assert torch.equal(other.predict(BATCH), expected)
    assert not torch.equal(model.predict(BATCH), expected)
    assert isinstance(other.weights(BATCH), Routes)
