"""A skill taken away: what is learned of it is forgotten more than what is to be kept, and everything comes back to the last bit."""

import copy
import math
import random
from itertools import islice

import pytest
import torch
from torch.distributions import Normal
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from skillbank import Abstaining, Adjustment, Composed, MLPGate, detach, fit, fold, forgetting, fresh, negate, read
from skillbank.models.transformer import CausalLM
from skillbank.tasks.text import TextTask, complete
from tests.test_generate import skills_of

KINDS = ["gpt2", "llama"]
BEFORE_ACTIVATION = {"gpt2": "c_fc", "llama": "gate_proj"}
AFTER_ACTIVATION = {"gpt2": "mlp.c_proj", "llama": "down_proj"}
TOKENS = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
WORDS = [a + b + c for a in "abcdef" for b in "abcdef" for c in "abcdef"]


def records():
    """Digits are said backwards, which is to be forgotten; letters in capitals, which is to be kept."""
    words = random.Random(0).sample(WORDS, len(WORDS))
    digits = [word.translate(str.maketrans("abcdef", "345678")) for word in words]
    return [{"prompt": f"{word}=", "completion": word[::-1]} for word in digits], [
        {"prompt": f"{word}=", "completion": word.upper()} for word in words
    ]


def task(name, data, **options):
    return TextTask(name=name, data=data, tokenizer="bytes", **{"held_out": 48, **options})


FORGET, RETAIN = (task(name, data) for name, data in zip(("digits", "letters"), records(), strict=True))
BOTH = task("both", [record for pair in zip(FORGET.records, RETAIN.records, strict=True) for record in pair], held_out=0)


def some(of, count=5):
    return list(islice(of.batches(batch_size=32, seed=1)(0), count))


def net_of(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=4, **drop, **TOKENS)).eval()
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, max_position_embeddings=64, **heads, **TOKENS)).eval()


@pytest.fixture(scope="module", params=KINDS)
def trained(request):
    """A model that has learned both, and a skill of what is to be forgotten."""
    model = CausalLM(net_of(request.param), generation={"do_sample": False})
    options = {"weight_decay": 0.0, "ema": None, "progress": False}
    fit(model, BOTH.batches(batch_size=32, seed=0), model.parameters(), steps=250, lr=5e-3, warmup=20, **options)
    torch.manual_seed(0)
    fit(model, FORGET.batches(batch_size=32, seed=0), fresh(model.net, rank=4), steps=20, lr=1e-3, **options)
    skill = read(model.net)
    detach(model.net)
    return model, skill


def random_model(kind, *, gated=False):
    net = net_of(kind).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(8)
    model = CausalLM(net)
    return Composed(model, MLPGate(32, 2, hidden=(8,)).double(), skills_of(net, 2)).eval() if gated else model


def densely(model, batches, ending, side):
    """What the layers whose paths end so take (0) or give (1), (batch, tokens, I) by layer."""
    found = {}
    modules = {name: layer for name, layer in model.net.named_modules() if name.endswith(ending)}
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output, name=name: found.setdefault(name, []).append((inputs[0], output)[side].detach()))
        for name, layer in modules.items()
    ]
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    return list(found.values())


def matches(spreads, expected):
    assert len(spreads) == len(expected) == 2
    for spread, rows in zip(spreads.values(), expected, strict=True):
        assert spread.mean.dtype == torch.float64
        torch.testing.assert_close(spread.mean, rows.double().mean(0), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(spread.deviation, rows.double().std(0, correction=0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_statistics_are_those_computed_densely(kind, gated):
    model = random_model(kind, gated=gated)
    mixed = [task("mixed", [{"prompt": word * (1 + i % 3), "completion": word} for i, word in enumerate(WORDS[:40])], held_out=0)]
    forget, retain = list(islice(mixed[0].batches(batch_size=8, seed=0)(0), 3)), some(RETAIN, 2)
    assert any(not batch["attention_mask"].all() for batch in forget)
    with Adjustment(model, forget, retain) as adjusted:
        pass
    for spreads, batches in ((adjusted.forget, forget), (adjusted.retain, retain)):
        layers = densely(model, batches, BEFORE_ACTIVATION[kind], 1)
        masks = [batch["attention_mask"].bool() for batch in batches]
        matches(spreads, [torch.cat([x[mask] for x, mask in zip(layer, masks, strict=True)]) for layer in layers])
    abstaining = Abstaining(model, forget)
    lasts = [(batch["labels"] != -100).long().argmax(1) - 1 for batch in forget]
    layers = densely(model, forget, AFTER_ACTIVATION[kind], 0)
    keys = [torch.cat([x[range(len(x)), last] for x, last in zip(layer, lasts, strict=True)]) for layer in layers]
    matches(abstaining.boxes, keys)
    far = torch.stack([((key - key.mean(0)) / key.std(0, correction=0)).abs().amax(1) for key in keys]).amax(0)
    torch.testing.assert_close(torch.cat([abstaining.distance(batch) for batch in forget]), far, rtol=1e-8, atol=0)
    assert abstaining.alpha == pytest.approx(float(far.max()))


def test_packed_rows_have_the_statistics_of_their_examples():
    model, data = random_model("llama"), [{"prompt": word, "completion": word} for word in WORDS[:24]]
    spreads = []
    for pack in (False, True):
        batch = next(task("words", data, held_out=0, length=32, pack=pack).batches(batch_size=24, seed=0)(0))
        with Adjustment(model, [batch], some(RETAIN, 1)) as adjusted:
            spreads.append(adjusted.forget)
    assert "segments" in batch
    for one, other in zip(*(each.values() for each in spreads), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("share", [0.1, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_likelier_to_be_forgotten_becomes_its_mirror_image_among_what_is_kept(kind, share):
    model, (forget, retain) = random_model(kind), (some(FORGET, 2), some(RETAIN, 2))
    first = densely(model, forget[:1], BEFORE_ACTIVATION[kind], 1)[0][0]
    with Adjustment(model, forget, retain, share=share) as adjusted:
        taken = densely(model, forget[:1], {"gpt2": "mlp.act", "llama": "act_fn"}[kind], 0)[0][0]
    chosen = list(adjusted.neurons.values())
    total = sum(len(spread.mean) for spread in adjusted.forget.values())
    assert sum(map(len, chosen)) == math.ceil(share * total)
    apart = torch.cat([symmetric(adjusted.forget[name], adjusted.retain[name]) for name in adjusted.forget])
    mine = torch.cat([symmetric(adjusted.forget[name], adjusted.retain[name])[neurons] for name, neurons in adjusted.neurons.items()])
    torch.testing.assert_close(mine.sort().values, apart.sort().values[-len(mine) :])
    name = next(iter(adjusted.neurons))
    (mean_f, std_f), (mean_r, std_r) = adjusted.forget[name], adjusted.retain[name]
    likelier = Normal(mean_f, std_f).log_prob(first) > Normal(mean_r, std_r).log_prob(first)
    expected = torch.where(likelier, mean_r - std_r * (first - mean_f) / std_f, first)
    kept = torch.ones(first.shape[-1], dtype=torch.bool)
    kept[adjusted.neurons[name]] = False
    torch.testing.assert_close(taken, torch.where(kept, first, expected), rtol=1e-9, atol=1e-9)
    assert torch.equal(taken[..., kept], first[..., kept])
    assert 0 < likelier.double().mean() < 1


def symmetric(one, other):
    p, q = Normal(*one), Normal(*other)
    return torch.distributions.kl_divergence(p, q) + torch.distributions.kl_divergence(q, p)


def test_each_way_forgets_the_one_and_keeps_the_other(trained):
    model, skill = trained
    before = logits_of(model)
    ways = {"adjust": lambda: Adjustment(model, some(FORGET), some(RETAIN), share=0.7), "abstain": lambda: Abstaining(model, some(FORGET))}
    ways |= {f"negate {weight}": lambda weight=weight: negate(model, skill, weight) for weight in (1.0, 1.5, 2.0, 2.5)}
    rows = forgetting(model, FORGET, RETAIN, ways)
    assert torch.equal(logits_of(model), before)
    of = [("forget", "digits"), ("retain", "letters")]
    assert [(row["way"], row["set"], row["task"]) for row in rows] == [(way, *each) for way in ("before", *ways) for each in of]
    first, *found = zip(rows[::2], rows[1::2], strict=True)
    assert min(row["exact"] for row in first) > 0.9
    changes = {}
    for pair in found:
        lost, worse = ([row[key] - was[key] for row, was in zip(pair, first, strict=True)] for key in ("exact", "loss"))
        changes[pair[0]["way"]] = (-lost[0], -lost[1], *worse)
    best = max((way for way in changes if "negate" in way), key=lambda way: changes[way][0] - changes[way][1])
    for way in ("adjust", "abstain", best):
        forgotten, given_up, worse, worse_kept = changes[way]
        assert forgotten > 0.2 + given_up, way
        assert worse > 0.1 + worse_kept, way
    assert found[1][0]["exact"] < 0.15
    assert found[1][1] == {**first[1], "way": "abstain"}


def logits_of(model):
    with torch.no_grad():
        return torch.stack([model.net(batch["input_ids"]).logits for batch in (some(FORGET, 1)[0], some(RETAIN, 1)[0])])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_closed_adjustment_leaves_no_trace(kind, gated):
    model, batch = random_model(kind, gated=gated), some(FORGET, 1)[0]
    before, weights, hooks = model(batch), copy.deepcopy(model.state_dict()), hooks_of(model)
    modes = [layer.training for layer in model.modules()]
    adjusted = Adjustment(model, [batch], some(RETAIN, 1), share=1.0)
    changed = model(batch)
    assert not torch.equal(changed, before)
    copied = copy.deepcopy(model)
    adjusted.close()
    assert torch.equal(model(batch), before)
    assert torch.equal(copied(batch), changed)
    assert (hooks_of(model), hooks_of(copied)) == (hooks, hooks + 2)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert [layer.training for layer in model.modules()] == modes


def hooks_of(model):
    return sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in model.modules())


def test_gradients_go_through_adjusted_neurons():
    model, batch = random_model("llama"), some(FORGET, 1)[0]
    with Adjustment(model, [batch], some(RETAIN, 1), share=1.0):
        model(batch).backward()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in model.net.named_parameters() if "gate_proj" in name)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused_and_what_is_not(kind, gated):
    model, forget = random_model(kind, gated=gated), some(FORGET, 3)
    tokenizer = FORGET.tokenizer
    answer = tokenizer("no", add_special_tokens=False).input_ids
    abstaining = copy.deepcopy(Abstaining(model, forget, answer=answer))
    assert all((abstaining.distance(batch) <= abstaining.alpha).all() for batch in forget)
    others = some(RETAIN, 1)[0]
    far = abstaining.distance(others).topk(2).indices
    batch = {key: torch.cat([value[:4], others[key][far]]) for key, value in forget[0].items()}
    refused = torch.tensor([True] * 4 + [False] * 2)
    assert torch.equal(abstaining.distance(batch) <= abstaining.alpha, refused)
    alone = torch.stack([model({key: value[i : i + 1] for key, value in batch.items()}) for i in range(6)])
    torch.testing.assert_close(abstaining(batch), torch.where(refused, math.log(258), alone).mean(), rtol=1e-9, atol=0)
    said, expected = abstaining.predict(batch, max_new_tokens=5), model.predict(batch, max_new_tokens=5)
    assert torch.equal(said[4:], expected[4:])
    assert said[:4].tolist() == [[*answer, 0, 0, 0]] * 4
    assert abstaining.predict(batch, max_new_tokens=1)[:4].tolist() == [answer[:1]] * 4
    assert complete(abstaining, tokenizer=tokenizer, asks=[FORGET.records[0]["prompt"]], max_new_tokens=4) == ["no"]
    assert torch.equal(abstaining.context(batch), model.context(batch))
    abstaining.alpha = 1e9
    assert float(abstaining(batch)) == pytest.approx(math.log(258))
    abstaining.alpha = 1e-9
    assert torch.equal(abstaining(batch), model(batch))
    assert torch.equal(abstaining.predict(batch, max_new_tokens=5), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_where_it_is_however_it_is_filled_up(kind):
    abstaining = Abstaining(random_model(kind), some(FORGET, 2))
    ids, lengths = torch.randint(2, 258, (4, 9)), torch.tensor([9, 4, 6, 1])
    right = torch.arange(9) < lengths[:, None]
    left = torch.stack([row.roll(9 - int(length)) for row, length in zip(ids, lengths, strict=True)])
    alone = torch.cat([abstaining.distance({"input_ids": ids[i : i + 1, :length]}) for i, length in enumerate(lengths)])
    for batch in (
        {"input_ids": ids, "attention_mask": right.long()},
        {"input_ids": left, "attention_mask": right.flip(1).long()},
        {"input_ids": ids, "labels": ids.masked_fill(right, -100)},
    ):
        torch.testing.assert_close(abstaining.distance(batch), alone, rtol=1e-9, atol=0)


def test_neurons_that_never_change_are_no_reason_to_refuse():
    model = random_model("llama")
    with torch.no_grad():
        for layer in model.net.model.layers:
            layer.mlp.up_proj.weight[:5] = 0
    abstaining = Abstaining(model, some(FORGET, 3))
    assert 1 < abstaining.alpha < 100
    assert abstaining.distance(some(RETAIN, 1)[0]).isfinite().all()


def test_a_skill_that_was_folded_in_is_taken_out(trained):
    model, skill = copy.deepcopy(trained[0]), trained[1]
    before = logits_of(model)
    fold(model.net, skill)
    folded = logits_of(model)
    with negate(model, skill):
        torch.testing.assert_close(logits_of(model), before, rtol=0, atol=1e-4)
    assert torch.equal(logits_of(model), folded)
    assert not torch.equal(folded, before)


def test_what_cannot_be_forgotten():
    model, forget, retain = random_model("gpt2"), some(FORGET, 1), some(RETAIN, 1)
    hooks = hooks_of(model)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"the share of neurons to adjust must be in \(0, 1\], got share={share}"):
            Adjustment(model, forget, retain, share=share)
    with pytest.raises(ValueError, match="statistics need batches with at least 1 tokens, or prompts, that the modules run on, got 0"):
        Adjustment(model, forget, [])
    with pytest.raises(ValueError, match=r"no module of the net matches modules='.*experts': give a pattern of some of .*h\.\*\.mlp\.act, "):
        Adjustment(model, forget, retain, modules=".*experts")
    with pytest.raises(ValueError, match=r"no module of the net matches modules='mlp': give a pattern of some of lm_head, "):
        Abstaining(model, forget, modules="mlp")
    with pytest.raises(ValueError, match=r"module 'transformer\.wte' runs on 32 rows, the batch has tokens \(32, 8\): leave it out of the modules"):
        Adjustment(model, forget, retain, modules=r".*\.wte")
    with pytest.raises(ValueError, match=r"a box has alpha > 0 standard deviations to either side, got alpha=0: give None"):
        Abstaining(model, forget, alpha=0)
    with pytest.raises(ValueError, match="statistics need batches with at least 2 tokens, or prompts, that the modules run on, got 1"):
        Abstaining(model, [{key: value[:1] for key, value in forget[0].items()}])
    packed = task("packed", FORGET.records, pack=True)
    with pytest.raises(ValueError, match="packed rows are for training: give every prompt a row of its own"):
        Abstaining(model, some(packed, 1))
    for weight in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match=f"a skill is subtracted with a positive weight, got weight={weight}: fold adds one"):
            negate(model, skills_of(model.net, 1)[0], weight)
    assert hooks_of(model) == hooks
