"""Levels of composition: what each says is what its formula says, token by token, and one skill alone is itself at every level."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import skillbank as sb
from skillbank.bank.card import Card
from skillbank.levels import LEVELS, described
from skillbank.model import check_model
from skillbank.models.transformer import CausalLM
from skillbank.skill import Skill
from skillbank.tasks.text import TextTask, complete, rows_of
from skillbank.tasks.tokens import encoded
from skillbank.tokenizer import byte_tokenizer, kept

LENGTH, NEW, VOCABULARY = 5, 6, 31
IDS = torch.randint(3, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(2))
RIGHT = torch.arange(LENGTH) < torch.tensor([5, 2, 4, 1])[:, None]
BATCH = {"input_ids": IDS, "attention_mask": RIGHT.long()}


def text(kind, *, seed=0, size=16, vocabulary=VOCABULARY, tokenizer=None, **generation):
    torch.manual_seed(seed)
    if kind == "gpt2":
        net = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_positions=96, n_embd=size, n_layer=2, n_head=2, initializer_range=0.3))
    else:
        heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 96}
        net = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=size, intermediate_size=24, initializer_range=0.3, **heads))
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **generation}
    return CausalLM(net.double().eval(), tokenizer=tokenizer, generation=options)


def skills_of(model, count):
    layers = [name for name, layer in model.net.named_modules() if type(layer).__name__ in ("Linear", "Conv1D") and "head" not in name]
    skills = []
    for seed in range(count):
        generator, factors = torch.Generator().manual_seed(seed), {}
        for name in layers:
            shape = model.net.get_submodule(name).weight.shape
            out, width = shape[::-1] if model.net.config.model_type == "gpt2" else shape
            factors[name] = tuple(torch.randn(*size, generator=generator, dtype=torch.float64) / 2 for size in ((2, width), (out, 2)))
        skills.append(Skill(factors))
    return skills


def alone(model, skill=None):
    """Copy of a base with one skill on it."""
    model = copy.deepcopy(model)
    if skill is not None:
        sb.attach(model.net, skill)
    return model


def at(level, model, skills, weights=None, **options):
    return sb.compose_at(level, copy.deepcopy(model), skills, weights, **options)


def logits_of(model, ids):
    with torch.no_grad():
        return model.net(ids).logits


def greedily(step, ids, new=NEW):
    """New tokens after prompts of one length, each from a full pass without a cache."""
    for _ in range(new):
        ids = torch.cat([ids, step(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[:, -new:]


def by_row(model, batch=BATCH, **options):
    """Predictions of every row by itself, without its padding."""
    masks = batch["attention_mask"].bool()
    return torch.cat([model.predict({"input_ids": row[mask][None]}, **options) for row, mask in zip(batch["input_ids"], masks, strict=True)])


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


KINDS = pytest.mark.parametrize("kind", ["gpt2", "llama"])


@KINDS
def test_one_skill_is_itself_at_every_level(kind):
    base = text(kind)
    skills = skills_of(base, 3)
    expected = alone(base, skills[1])
    options = {"emulated": {"large": copy.deepcopy(base)}}
    for level in ("merge", "gate", "logits", "emulated", "vote", "rerank"):
        one = [0.0, 1.0, 0.0]
        for model in (at(level, base, skills, one, **options.get(level, {})), at(level, base, [skills[1]], [1.0], **options.get(level, {}))):
            check_model(model, BATCH)
            if level != "rerank" or len(model.weights) == 1:  # a judge may prefer another skill's answer
                assert torch.equal(model.predict(BATCH), expected.predict(BATCH)), level
            close(model(BATCH).double(), expected(BATCH))
            close(model.context(BATCH), expected.context(BATCH))
            if level in ("logits", "emulated"):
                close(model.logits(BATCH), expected.net(IDS, attention_mask=BATCH["attention_mask"]).logits)
                close(model.losses(BATCH), expected.losses(BATCH))
    behind = text(kind)
    behind.layer = 1
    for level in ("logits", "vote", "rerank"):
        model = at(level, behind, skills)
        for _ in range(2):  # before it has weights, and after
            close(model.context(BATCH), behind.context(BATCH))
            model.predict(BATCH)
    for level in ("logits", "emulated", "vote", "rerank"):
        model = at(level, base, [skills[1]] * 3, **options.get(level, {}))
        assert torch.equal(model.predict(BATCH), expected.predict(BATCH)), level
        close(model.losses(BATCH), expected.losses(BATCH))
    assert not torch.equal(alone(base, skills[0]).predict(BATCH), expected.predict(BATCH))


@KINDS
def test_logits_are_the_weighted_sum(kind):
    base, weights = text(kind), [0.75, -0.5, 1.25]
    skills = skills_of(base, 3)
    each = [alone(base, skill) for skill in skills]

    def total(ids):
        return sum(weight * logits_of(model, ids) for weight, model in zip(weights, each, strict=True))

    model = at("logits", base, skills, torch.tensor(weights))
    close(model.logits({"input_ids": IDS}), total(IDS))
    expected = greedily(total, IDS)
    assert torch.equal(model.predict({"input_ids": IDS}), expected)
    assert torch.equal(model.predict({"input_ids": IDS}, max_new_tokens=3), expected[:, :3])
    model.model.generation["use_cache"] = False
    assert torch.equal(model.predict({"input_ids": IDS}), expected)
    probabilities = sum(weight * logits_of(one, IDS).log_softmax(-1) for weight, one in zip(weights, each, strict=True)).log_softmax(-1)
    close(model.logits({"input_ids": IDS}).log_softmax(-1), probabilities)
    labels = IDS.masked_fill(torch.arange(LENGTH) < 3, -100)
    found = -probabilities[:, 2:4].gather(-1, IDS[:, 3:, None])[..., 0].mean(1)
    close(model.losses({"input_ids": IDS, "labels": labels}), found)
    segments = torch.tensor([[1, 1, 2, 2, 2]] * 4)
    parts = [model.losses({"input_ids": part}) for part in (IDS[:, :2], IDS[:, 2:])]
    close(model.losses({"input_ids": IDS, "segments": segments}), torch.stack(parts, 1).flatten())


@KINDS
def test_emulated_fine_tuning_is_the_formula(kind):
    small, large = text(kind), text(kind, seed=5, size=24)
    skills, weights, scale = skills_of(small, 2), [0.5, 2.0], 0.7
    each = [alone(small, skill) for skill in skills]

    def total(ids):
        base = logits_of(small, ids)
        return logits_of(large, ids) + scale * sum(weight * (logits_of(model, ids) - base) for weight, model in zip(weights, each, strict=True))

    model = at("emulated", small, skills, weights, large=large, scale=scale)
    close(model.logits({"input_ids": IDS}), total(IDS))
    expected = greedily(total, IDS)
    assert torch.equal(model.predict({"input_ids": IDS}), expected)
    large.generation["use_cache"] = False
    assert torch.equal(model.predict({"input_ids": IDS}), expected)
    assert torch.equal(at("emulated", small, skills, large=large, scale=0.0).predict(BATCH), large.predict(BATCH))


@KINDS
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_of_prompts_is_each_alone(kind, beams):
    base = text(kind, num_beams=beams)
    skills, large = skills_of(base, 2), text(kind, seed=5, size=24, num_beams=beams)
    left = {key: torch.stack([row.roll(LENGTH - int(mask.sum())) for row, mask in zip(value, RIGHT, strict=True)]) for key, value in BATCH.items()}
    answered = {"input_ids": IDS, "labels": IDS.masked_fill(RIGHT, -100)}
    for level in ("merge", "gate", "logits", "emulated", "vote", "rerank"):
        model = at(level, base, skills, [0.25, 0.75], **({"large": large} if level == "emulated" else {}))
        expected = by_row(model)
        for batch in (BATCH, left, answered):
            assert torch.equal(model.predict(batch), expected), level


@pytest.mark.parametrize("level", ["logits", "emulated"])
def test_beams_carry_their_caches_along(level):
    base = text("llama", num_beams=4, length_penalty=0.0)
    skills, options = skills_of(base, 2), {"large": text("llama", seed=5, size=24, num_beams=4, length_penalty=0.0)} if level == "emulated" else {}
    model = at(level, base, skills, [0.25, 0.75], **options)
    found = model.predict(BATCH)
    model.speaker.generation["use_cache"] = False
    assert torch.equal(model.predict(BATCH), found)
    model.speaker.generation |= {"num_beams": 1, "use_cache": True}
    assert not torch.equal(model.predict(BATCH), found)


@KINDS
def test_rows_end_where_their_text_ends(kind):
    base = text(kind)
    skills, large = skills_of(base, 3), text(kind, seed=5, size=24)
    for level in ("logits", "emulated", "vote", "rerank"):
        options = {"large": copy.deepcopy(large)} if level == "emulated" else {}
        model = at(level, base, skills, **options)
        free = model.predict(BATCH)
        end = int(free[0, 2])
        speaker = getattr(model, "speaker", model.model)
        speaker.generation["eos_token_id"] = [end, VOCABULARY - 1]
        found = model.predict(BATCH)
        assert torch.equal(found, by_row(model)), level
        if level in ("logits", "emulated"):
            over = torch.isin(free, torch.tensor([end, VOCABULARY - 1])).long()
            assert torch.equal(found, free.masked_fill(over.cumsum(1) - over > 0, 0)), level
            assert (found[0, 3:] == 0).all()


def test_draws_are_those_of_one_skill_alone():
    base = text("llama", do_sample=True, top_k=8, temperature=1.5)
    skills = skills_of(base, 2)
    expected = alone(base, skills[1])
    for level, options in (("logits", {}), ("emulated", {"large": copy.deepcopy(base)})):
        model = at(level, base, skills, [0.0, 1.0], **options)
        found = []
        for each in (expected, model):
            torch.manual_seed(3)
            found.append(each.predict(BATCH))
        assert torch.equal(*found), level


def test_other_ways_to_generate():
    base = text("llama")
    skills, large = skills_of(base, 2), text("llama", seed=5, size=24)
    model = at("logits", base, skills)
    expected = model.predict(BATCH)
    model.model.generation |= {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.predict(BATCH), expected)
    emulated, plain = at("emulated", base, skills, large=large), large.generation
    for options in ({"cache_implementation": "static", "disable_compile": True}, {"prompt_lookup_num_tokens": 2}):
        emulated.large.generation = {**plain, **options}
        with pytest.raises(ValueError, match="keeps a cache for each net, which can only grow: leave cache_implementation and assistants out"):
            emulated.predict({"input_ids": torch.tensor([[3, 4, 3, 4, 3, 4]])}, max_new_tokens=12)


def test_no_cache_is_kept():
    base, kept_caches = text("llama"), []
    model = at("emulated", base, skills_of(base, 1), large=text("llama", seed=5, size=24))
    model.large.net.register_forward_pre_hook(lambda net, args, kwargs: kept_caches.append(weakref.ref(kwargs["past_key_values"])), with_kwargs=True)
    gc.disable()
    try:
        model.predict(BATCH)
        assert len(kept_caches) == NEW
        assert not any(cache() for cache in kept_caches)
    finally:
        gc.enable()


@KINDS
def test_votes(kind):
    base = text(kind)
    skills = skills_of(base, 3)
    said = [alone(base, skill).predict(BATCH) for skill in skills]
    assert torch.equal(at("vote", base, [skills[0], skills[1], skills[0]]).predict(BATCH), said[0])
    assert torch.equal(at("vote", base, [skills[1], skills[2], skills[0], skills[2]]).predict(BATCH), said[2])
    assert torch.equal(at("vote", base, skills, [1.0, 3.0, 1.5]).predict(BATCH), said[1])
    own = torch.stack([scored(alone(base, skill), answers) for skill, answers in zip(skills, said, strict=True)])
    model = at("vote", base, skills)
    assert torch.equal(model.predict(BATCH), torch.stack(said)[own.argmin(0), torch.arange(4)])
    assert torch.equal(at("vote", base, skills[::-1]).predict(BATCH), model.predict(BATCH))
    close(model.losses(BATCH), torch.stack([alone(base, skill).losses(BATCH) for skill in skills]).mean(0))
    two = torch.stack([own[0], own[1].new_full((4,), torch.inf), own[2]]).argmin(0)  # a tie of two, of which nobody asks the third
    found = at("vote", base, [skills[0], skills[1], skills[2]], [2.0, 1.0, 2.0]).predict(BATCH)
    assert torch.equal(found, torch.stack(said)[two, torch.arange(4)])


def scored(model, answers, sizes=(NEW,) * 4):
    """Mean loss of the tokens of answers (B, N) after their prompts, one row at a time."""
    found = []
    for row, mask, whole, size in zip(IDS, RIGHT, answers, sizes, strict=True):
        answer = whole[:size]
        logits = logits_of(model, torch.cat([row[mask], answer])[None])[0, int(mask.sum()) - 1 : -1].log_softmax(-1)
        found.append(-logits.gather(1, answer[:, None]).mean())
    return torch.stack(found)


@KINDS
@pytest.mark.parametrize("judge", ["skills", "base", "model"])
def test_reranking(kind, judge):
    base, other = text(kind), text(kind, seed=9)
    skills, weights = skills_of(base, 3), [1.0, 0.0, 2.5]
    said = [alone(base, skill).predict(BATCH) for skill in skills]
    if judge == "skills":
        judged = [sum(w * scored(alone(base, skill), answers) for w, skill in zip(weights, skills, strict=True)) / 3.5 for answers in said]
    else:
        judged = [scored(base if judge == "base" else other, answers) for answers in said]
    model = at("rerank", base, skills, weights, judge=copy.deepcopy(other) if judge == "model" else judge)
    best = torch.stack(judged).argmin(0)
    assert torch.equal(model.predict(BATCH), torch.stack(said)[best, torch.arange(4)])
    found = rows_of_answers(said[0])
    close(model.losses(found), judged[0])


@KINDS
def test_an_answer_is_judged_with_its_end_and_no_further(kind):
    base = text(kind)
    skills = skills_of(base, 3)
    end = int(alone(base, skills[0]).predict(BATCH)[0, 1])
    base.generation["eos_token_id"] = end
    said = [alone(base, skill).predict(BATCH) for skill in skills]
    sizes = [[int((row == end).int().argmax()) + 1 if (row == end).any() else NEW for row in answers] for answers in said]
    assert {NEW} < {size for lengths in sizes for size in lengths}
    judged = torch.stack([scored(base, answers, lengths) for answers, lengths in zip(said, sizes, strict=True)])
    model = at("rerank", base, skills, judge="base")
    close(torch.stack([model.losses(model._answered(BATCH, answers)) for answers in said]), judged)
    assert torch.equal(model.predict(BATCH), torch.stack(said)[judged.argmin(0), torch.arange(4)])


def rows_of_answers(answers):
    rows = [torch.cat([row[mask], answer]) for row, mask, answer in zip(IDS, RIGHT, answers, strict=True)]
    pad = torch.nn.utils.rnn.pad_sequence
    labels = [torch.cat([torch.full((int(mask.sum()),), -100), answer]) for mask, answer in zip(RIGHT, answers, strict=True)]
    masks = [torch.ones_like(row) for row in rows]
    return {"input_ids": pad(rows, True), "attention_mask": pad(masks, True), "labels": pad(labels, True, -100)}


RECORDS = [{"prompt": f"{word}:", "completion": word[::-1]} for word in ("ab", "cde", "f", "gh")]
MORE = [{"prompt": "xyz:", "completion": "zyx"}]
TEMPLATE = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"


def spelling(kind="llama", **generation):
    tokenizer = byte_tokenizer()
    return text(kind, vocabulary=len(tokenizer), tokenizer=kept(tokenizer), eos_token_id=1, **generation), tokenizer


@KINDS
def test_in_context_is_the_base_after_the_examples(kind):
    base, tokenizer = spelling(kind)
    model = at("in_context", base, skills_of(base, 2), examples=[RECORDS[:1], MORE], template="{prompt}{completion}\n\n\n")
    check_model(model, rows_of([encoded(tokenizer, record) for record in RECORDS], tokenizer))
    ahead = "ab:ba\n\n\nxyz:zyx\n\n\n"
    asks = [record["prompt"] for record in RECORDS]
    assert complete(model, tokenizer=tokenizer, asks=asks) == complete(base, tokenizer=tokenizer, asks=[ahead + ask for ask in asks])
    plain, longer = (
        rows_of([encoded(tokenizer, {**record, "prompt": before + record["prompt"]}) for record in RECORDS], tokenizer) for before in ("", ahead)
    )
    close(model.losses(plain), base.losses(longer))
    close(model.context(plain), base.context(plain))
    unlabelled = {key: plain[key] for key in ("input_ids", "attention_mask")}
    every = longer["input_ids"].masked_fill(longer["attention_mask"] == 0, -100)
    every[:, : len(ahead)] = -100
    close(model.losses(unlabelled), base.losses({**longer, "labels": every}))
    assert torch.equal(model.predict(plain), base.predict(longer))


def test_the_token_that_starts_a_text_stays_first():
    base, tokenizer = spelling()
    tokenizer.bos_token, tokenizer.chat_template = tokenizer.decode([5]), "{{ bos_token }}" + TEMPLATE
    start, ask, said = 5, [20, 21], [[5, 20, 21], [5, 20], [20, 21]]
    example = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    sb.attach(base.net, skills_of(base, 1)[0])
    model = at("in_context", base, (), examples=[[example, example]], tokenizer=tokenizer)
    sb.detach(base.net)
    assert encoded(tokenizer, example).ids[0] == start
    prefix = encoded(tokenizer, example).ids[1:] * 2
    batch = {"input_ids": torch.tensor([[*row, *[0] * (3 - len(row))] for row in said])}
    batch["attention_mask"] = (batch["input_ids"] > 0).long()
    expected = [[start, *prefix, *ask], [start, *prefix, ask[0]], [*prefix, *ask]]
    found = torch.cat([base.predict({"input_ids": torch.tensor([row])}) for row in expected])
    assert torch.equal(model.predict(batch), found)
    losses = [base.losses({"input_ids": torch.tensor([row]), "labels": labels_of(row, prefix)}) for row in expected]
    close(model.losses(batch), torch.cat(losses))


def labels_of(row, prefix):
    labels = torch.tensor([row])
    at = int(row[0] == 5)
    labels[:, at : at + len(prefix)] = -100
    return labels


class Parrot(CausalLM):
    """Says the same whatever it is asked."""

    said = ""

    def predict(self, batch, *, max_new_tokens=None):
        tokens = [*byte_tokenizer()(self.said).input_ids, *[0] * NEW][:NEW]
        return torch.tensor([tokens] * len(batch["input_ids"]))


@pytest.mark.parametrize(
    ("said", "expected"), [("ba\n\nx:", "ba"), ("ba\nx", "ba\nx"), ("\n\nba", ""), ("é\n\né", "é"), ("ba", "ba"), ("abcd\n\n", "abcd")]
)
def test_an_answer_ends_where_another_example_would_begin(said, expected):
    base, tokenizer = spelling()
    base.__class__, base.said = Parrot, said
    model = at("in_context", base, (), examples=[RECORDS])
    assert complete(model, tokenizer=tokenizer, asks=["ab:", "c:"]) == [expected] * 2
    assert complete(at("in_context", base, (), examples=[RECORDS], template="{prompt}{completion}"), ["ab:"], tokenizer=tokenizer) == [said]


def card(**values):
    return Card(kind="skill", hash="0" * 64, files={}, **values)


def test_what_cards_say():
    cards = [card(conf={"task": {"name": "strings/reverse"}}, notes="Turns a word\naround.", tags=("text", "words")), card(notes="Adds {numbers}.")]
    assert [described(each) for each in cards] == ["strings/reverse: Turns a word around. (text, words)", "Adds {numbers}."]
    base, tokenizer = spelling()
    model = at("in_context", base, (), cards=cards)
    assert tokenizer.decode(model.prefix) == "Skill: strings/reverse: Turns a word around. (text, words)\nSkill: Adds {numbers}.\n"
    model = at("in_context", base, (), cards=cards, examples=[MORE, []], heading="# {description}\n", template="{prompt}{completion};")
    assert tokenizer.decode(model.prefix) == "# strings/reverse: Turns a word around. (text, words)\nxyz:zyx;# Adds {numbers}.\n"
    tokenizer.chat_template = TEMPLATE
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    model = at("in_context", base, (), examples=[[{"messages": turns}]], tokenizer=tokenizer)
    assert tokenizer.decode(model.prefix) == "<user>hi</s><assistant>yo</s>"
    with pytest.raises(ValueError, match="a card says nothing of its skill, neither a task nor notes nor tags"):
        at("in_context", base, (), cards=[card()])


def test_a_task_evaluates_every_level():
    base, tokenizer = spelling()
    skills = skills_of(base, 2)
    task = TextTask(name="test/levels", data=RECORDS, tokenizer=tokenizer, length=64, held_out=2)
    options = {
        "emulated": {"large": spelling(seed=5)[0]},
        "in_context": {"examples": [task.records, MORE]},
        "merge": {"method": "ties", "density": 0.5},
    }
    found = {level: task.evaluate(at(level, base, skills, **options.get(level, {}))) for level in LEVELS}
    assert all(set(row) == {"exact", "loss", "examples"} and row["loss"] > 0 for row in found.values())
    assert len({row["loss"] for row in found.values()}) == len(LEVELS) - 1  # those that answer have the mean of the skills' losses
    assert found["vote"] == found["rerank"] | {"exact": found["vote"]["exact"]}
    assert task.record(at("logits", base, skills)).weights is None


def test_constant_weights_of_a_gate_are_a_merge():
    base = text("llama")
    skills = skills_of(base, 2)
    models = [at(level, base, skills, [0.75, -0.5]) for level in ("merge", "gate")]
    close(*(model(BATCH) for model in models))
    close(*(model.losses(BATCH) for model in models))
    assert torch.equal(*(model.predict(BATCH) for model in models))
    judged = [at("rerank", base, skills, judge=model) for model in models]
    assert torch.equal(*(model.predict(BATCH) for model in judged))
    gate = sb.MLPGate(16, 2).double()
    gated = at("gate", base, skills, gate=gate, regulariser="mean")
    assert gated.gate is gate
    assert gated.regulariser == "mean"


def test_a_base_that_was_given_away_is_refused():
    base = text("llama")
    skills = skills_of(base, 2)
    options = {"emulated": {"large": text("llama", seed=5)}, "in_context": {"examples": [[], []], "tokenizer": byte_tokenizer()}}
    for level in ("merge", "logits", "emulated", "vote", "rerank", "in_context"):
        model = sb.compose_at(level, base, skills, **options.get(level, {}))
        sb.attach(base.net, skills[0])
        for use in (model, model.losses, model.predict):
            with pytest.raises(RuntimeError, match="another skill was attached to this net since it was composed: give every level a copy"):
                use(BATCH)


def test_what_cannot_be_composed():
    base, _ = spelling()
    plain, skills = text("llama"), skills_of(text("llama"), 2)
    unknown = {
        "unknown level 'logit': did you mean 'logits'": ("logit", plain, skills),
        "level 'logits' takes no 'scale': it has no options": ("logits", plain, skills, None, {"scale": 2}),
        "level 'rerank' takes no 'judg': did you mean 'judge'": ("rerank", plain, skills, None, {"judg": "base"}),
        "level 'emulated' needs large: give large=": ("emulated", plain, skills),
        "level 'vote' got no skills: give at least one": ("vote", plain, []),
        "level 'logits' got 3 weights for 2 skills": ("logits", plain, skills, [1, 2, 3]),
        "level 'emulated' got 1 weights for 2 skills": ("emulated", plain, skills, [1], {"large": text("llama")}),
        "level 'gate' got 1 weights for 2 skills": ("gate", plain, skills, [1]),
        "level 'gate' got a gate and weights": ("gate", plain, skills, [1, 0], {"gate": sb.MLPGate(16, 2)}),
        "level 'logits': weights must be finite, got": ("logits", plain, skills, [1, float("nan")]),
        "level 'emulated': weights must be finite, got": ("emulated", plain, skills, None, {"large": text("llama"), "scale": float("inf")}),
        "level 'vote': weights are at least 0 and not all 0, got": ("vote", plain, skills, [1, -1]),
        "level 'rerank': weights are at least 0 and not all 0, got": ("rerank", plain, skills, [0, 0]),
        "unknown judge 'me': choose skills, base, or a model": ("rerank", plain, skills, None, {"judge": "me"}),
        "two vocabularies, the nets have 40 and 31 tokens": ("emulated", plain, skills, None, {"large": text("llama", vocabulary=40)}),
        "two vocabularies, the nets have 31 and 258": ("rerank", base, skills, None, {"judge": plain}),
        "level 'in_context' got {'skills': 2, 'examples': 1, 'cards': 0}": ("in_context", base, skills, None, {"examples": [MORE]}),
        "level 'in_context' got {'skills': 2, 'examples': 0, 'cards': 0}": ("in_context", base, skills),
        "level 'in_context' has no use for weights": ("in_context", base, (), [1.0], {"examples": [MORE]}),
        "level 'in_context' reads examples, and the base was given without": ("in_context", plain, (), None, {"examples": [MORE]}),
        "the examples are 279 tokens, the base can take 96: give fewer": ("in_context", base, (), None, {"examples": [MORE * 31]}),
    }
    for message, (level, model, some, *rest) in unknown.items():
        weights, options = [*rest, None, None][:2]
        with pytest.raises(ValueError, match=message.replace("{", r"\{")):
            at(level, model, some, weights, **(options or {}))
    with pytest.raises(TypeError, match="level 'vote' is of language models, got Linear: give a CausalLM"):
        sb.compose_at("vote", torch.nn.Linear(2, 2), skills)
    with pytest.raises(ValueError, match="level 'emulated' needs two nets, large is the small model itself"):
        sb.compose_at("emulated", plain, skills, large=plain)
    model = at("vote", plain, skills)
    model.model.generation |= {"num_return_sequences": 2, "num_beams": 2}
    with pytest.raises(ValueError, match="level 'vote': every skill gives one answer to choose from, leave num_return_sequences"):
        model.predict(BATCH)
    model = at("in_context", base, (), examples=[MORE])
    with pytest.raises(ValueError, match="level 'in_context': packed rows have no place for examples, set pack to false"):
        model.losses({"input_ids": IDS, "segments": torch.ones_like(IDS)})


def test_a_small_model_that_takes_fewer_tokens_says_so():
    base = text("llama")
    large = copy.deepcopy(base)
    base.net.config.max_position_embeddings = 8
    model = at("emulated", base, skills_of(base, 1), large=large)
    with pytest.raises(ValueError, match="9 tokens are more than the 8 that the small model can take: shorten the text, or max_new_tokens"):
        model.predict(BATCH)


def test_padded_vocabularies_of_one_tokenizer_go_together():
    small, tokenizer = spelling()
    words = len(tokenizer)
    large = text("llama", seed=5, size=24, vocabulary=words + 6, tokenizer=kept(tokenizer))
    skill = skills_of(small, 1)[0]
    ids = {"input_ids": IDS}
    for one, other in ((small, large), (large, small)):
        skill = skills_of(one, 1)[0]
        found = at("emulated", one, [skill], large=other).logits(ids)
        expected = logits_of(other, IDS)
        expected[..., :words] += (logits_of(alone(one, skill), IDS) - logits_of(one, IDS))[..., :words]
        close(found, expected)
    tokenizer.add_tokens(["<more>"])
    strange = text("llama", vocabulary=words, tokenizer=kept(tokenizer))
    with pytest.raises(ValueError, match="two vocabularies, the nets have 258 and 258 tokens: logits are comparable between models of one tokenizer"):
        at("emulated", small, [skills_of(small, 1)[0]], large=strange)


def test_in_half_precision_the_sum_is_not_rounded():
    base = text("llama")
    skills = skills_of(base, 2)
    base.net.bfloat16()
    model = at("logits", base, skills)
    assert model.logits({"input_ids": IDS}).dtype == torch.float32
    assert at("emulated", base, skills, large=copy.deepcopy(base)).predict(BATCH).shape == (4, NEW)
