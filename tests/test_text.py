"""Text as a task: what counts in the loss, what is drawn when, and what is said to bad records."""

import json

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import skillbank as sb
from skillbank.model import check_model
from skillbank.models.transformer import CausalLM
from skillbank.tasks.records import read_records
from skillbank.tasks.text import TextTask, answer_of, complete, packed, rows_of
from skillbank.tasks.tokens import asked, encoded, tokenizer_of
from skillbank.tokenizer import kept, restored
from tests.tiny import close, random_skill

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
RECORDS = [{"prompt": f"{'abc' * i}:", "completion": f"{'cba' * i}"} for i in range(1, 9)]
NETS = {
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen3": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
}


def task(records=RECORDS, **options):
    return TextTask(**{"name": "test/text", "data": records, "tokenizer": "bytes", "length": 64, **options})


def model_of(kind="llama", tokenizer=None, **options):
    torch.manual_seed(0)
    limit = {} if kind == "gpt2" else {"max_position_embeddings": 64}
    net = {"model_type": kind, "initializer_range": 0.3, **limit, **NETS[kind]}
    return CausalLM(net, tokenizer=kept(tokenizer or tokenizer_of("bytes")), **options).eval()


def said(tokenizer, ids):
    return tokenizer.decode(ids)


def test_what_counts_is_what_is_to_be_said():
    tokenizer = tokenizer_of("bytes")
    ids, counts = encoded(tokenizer, {"prompt": "né:", "completion": "ok"})
    assert said(tokenizer, ids) == "né:ok</s>"
    assert said(tokenizer, [i for i, c in zip(ids, counts, strict=True) if c]) == "ok</s>"
    ids, counts = encoded(tokenizer, {"text": "ok"})
    assert (said(tokenizer, ids), all(counts)) == ("ok</s>", True)
    tokenizer.chat_template = TEMPLATE
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"))]
    ids, counts = encoded(tokenizer, {"messages": turns})
    assert said(tokenizer, ids) == "<user>a</s><assistant>b</s><user>c</s><assistant>d</s>"
    assert said(tokenizer, [i for i, c in zip(ids, counts, strict=True) if c]) == "b</s>d</s>"
    assert said(tokenizer, asked(tokenizer, {"messages": turns})) == "<user>a</s><assistant>b</s><user>c</s><assistant>"
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(ValueError, match="the chat template changes what was said before turn 1"):
        encoded(tokenizer, {"messages": turns})


@given(st.text(max_size=40).filter(lambda text: "<" not in text))  # but for the special tokens
def test_bytes_come_back(text):
    tokenizer = tokenizer_of("bytes")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert restored(kept(tokenizer))(text).input_ids == ids


def test_the_loss_is_that_of_what_counts():
    model, made = model_of(), task()
    tokenizer = made.tokenizer
    batch = rows_of([encoded(tokenizer, record) for record in RECORDS], tokenizer)
    check_model(model, batch)
    losses = model.losses(batch)
    for record, loss in zip(RECORDS, losses, strict=True):
        ids = torch.tensor([encoded(tokenizer, record).ids])
        length = len(record["completion"]) + 1
        logits = model.net(ids).logits[0, -length - 1 : -1].log_softmax(-1)
        expected = -logits[range(length), ids[0, -length:]].mean()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(batch), losses.mean())


@pytest.mark.parametrize("kind", NETS)
def test_packed_examples_do_not_see_each_other(kind):
    model = model_of(kind).double()
    tokenizer = tokenizer_of("bytes")
    records = [*RECORDS, {"text": "plain text"}, {"text": "more of it"}]
    examples = [encoded(tokenizer, record) for record in records]
    alone, rows = model.losses(rows_of(examples, tokenizer)), packed(examples, 64, tokenizer)
    assert len(rows["input_ids"]) < len(examples)
    torch.testing.assert_close(model.losses(rows).sort().values, alone.sort().values, rtol=1e-12, atol=1e-12)
    context, unlabelled = model.context(rows), model.context({key: rows[key] for key in ("input_ids", "segments")})
    for row, segments in enumerate(rows["segments"]):
        for segment in range(1, int(segments.max()) + 1):
            itself = segments == segment
            by_itself = model.context({key: rows[key][row : row + 1, itself] for key in ("input_ids", "labels")})
            torch.testing.assert_close(context[row, itself], by_itself.expand(int(itself.sum()), -1), rtol=1e-12, atol=1e-12)
            every = model.context({"input_ids": rows["input_ids"][row : row + 1, itself]})
            torch.testing.assert_close(unlabelled[row, itself], every.expand(int(itself.sum()), -1), rtol=1e-12, atol=1e-12)


def test_every_example_is_drawn_once_before_any_is_again():
    made = task([{"prompt": "p", "completion": "x" * i} for i in range(1, 41)], examples=37)
    stream = made.batches(batch_size=8, seed=3)
    batches = [next(stream(step)) for step in range(10)]
    lengths = [(batch["labels"] != -100).sum(1) - 1 for batch in batches]
    for epoch in (lengths[:5], lengths[5:]):
        seen = torch.cat(epoch)
        assert len(seen) == 40
        assert set(seen.tolist()) == set(range(1, 38))
    assert not torch.equal(torch.cat(lengths[:5]), torch.cat(lengths[5:]))
    again = stream(4)
    for batch in batches[4:]:
        assert all(torch.equal(value, next_[key]) for next_ in [next(again)] for key, value in batch.items())
    sides = [batch["input_ids"].shape[1] for batch in batches[:5]]
    assert sum(sides) < 5 * max(sides) * 0.8  # of about the same length together


def test_training_and_answers():
    made = task(RECORDS[:4], test=RECORDS[:4])
    model = model_of()
    before = made.evaluate(model)
    sb.fit(model, made.batches(batch_size=4, seed=0), model.parameters(), steps=150, lr=1e-2, ema=None, progress=False)
    after = made.evaluate(model.eval())
    assert (before["exact"], after["exact"], after["examples"]) == (0.0, 1.0, 4.0)
    assert after["loss"] < 0.1 < before["loss"]
    prompts = [record["prompt"] for record in RECORDS[:4]]
    together = complete(model, tokenizer=made.tokenizer, asks=prompts, max_new_tokens=13)
    assert together == [record["completion"] for record in RECORDS[:4]]
    assert [complete(model, tokenizer=made.tokenizer, asks=[prompt], max_new_tokens=13)[0] for prompt in prompts] == together
    assert made.evaluate(model, episodes=2)["examples"] == 2.0
    made.test = [{**RECORDS[0], "text": "from a book"}, {**RECORDS[1], "completion": "abc"}, {"text": "abc", "completion": "z"}]
    found = made.evaluate(model)  # of the two that ask something one is right
    assert (found["exact"], found["examples"]) == (0.5, 3.0)
    made.test = made.test[2:]
    assert set(made.evaluate(model)) == {"loss", "examples"}


def test_answers_are_as_long_as_the_net_can_take_with_their_own_prompts():
    records = [{"prompt": "a" * 50, "completion": "b"}, {"prompt": "c", "completion": "d" * 50}, {"prompt": "e" * 9, "completion": "f" * 9}]
    made, model = task(records, test=records, length=1024), model_of()  # which takes 64 tokens
    assert made.evaluate(model)["exact"] == 0
    answers = made.answers(model, records)
    for answer, record in zip(answers, records, strict=True):
        assert [answer] == complete(model, [record["prompt"]], tokenizer=made.tokenizer, max_new_tokens=len(record["completion"]) + 1)


def test_packed_rows_train_what_rows_train():
    losses = []
    for pack in (False, True):
        model, made = model_of().double(), task(RECORDS[:4], pack=pack)
        fitted = sb.fit(model, made.batches(batch_size=4, seed=0), model.parameters(), steps=5, lr=1e-2, log_every=1, ema=None, progress=False)
        losses.append(torch.tensor([row["loss"] for row in fitted.rows]))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


def test_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        model, made = model_of(checkpointing=checkpointing).double().train(), task()
        params = sb.fresh(model.net, rank=2)
        with torch.no_grad():
            for i, p in enumerate(params):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        model(next(made.batches(batch_size=4, seed=0)(0))).backward()
        gradients.append([p.grad for p in params])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_checkpointing_is_at_work_in_train_mode_and_not_under_a_gate():
    model, passes = model_of(checkpointing=True).train(), []
    model.net.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    batch, skill = next(task().batches(batch_size=4, seed=0)(0)), random_skill(model.net, modules=["model.layers.0.mlp.up_proj"])
    model(batch).backward()
    assert len(passes) == 2
    sb.Composed(model, sb.MLPGate(16, 1), [skill]).train()(batch).backward()
    assert len(passes) == 3


def test_a_model_from_a_folder(tmp_path):
    model = model_of("llama")
    model.net.save_pretrained(tmp_path)
    tokenizer_of("bytes").save_pretrained(tmp_path)
    again = CausalLM(str(tmp_path), dtype="float32").eval()
    batch = next(task(tokenizer=str(tmp_path)).batches(batch_size=4, seed=0)(0))
    assert torch.equal(again.losses(batch), model.losses(batch))
    assert CausalLM(str(tmp_path), dtype="bfloat16").net.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="no causal language model at '/nowhere', neither"):
        CausalLM("/nowhere")


def test_a_checkpoint_in_the_bank_is_a_base(tmp_path):
    """Its weights stay where they are, skills on it train and load."""
    model = model_of("llama")
    model.net.save_pretrained(tmp_path / "llama")
    tokenizer_of("bytes").save_pretrained(tmp_path / "llama")
    bank = sb.Bank(tmp_path / "bank")
    bank.put(sb.Checkpoint.scan(tmp_path / "llama"), "llama")
    base = sb.load("llama", bank)
    made = task(tokenizer="llama", bank=bank)
    batch = next(made.batches(batch_size=4, seed=0)(0))
    torch.testing.assert_close(base.losses(batch), model.losses(batch), rtol=1e-5, atol=1e-6)
    params = sb.fresh(base.net, rank=2)
    sb.fit(base, made.batches(batch_size=4, seed=0), params, steps=3, lr=1e-2, progress=False)
    bank.put(sb.read(base.net), "one", card={"base": "llama"})
    loaded = sb.load("one", bank)
    torch.testing.assert_close(loaded.losses(batch), base.eval().losses(batch), rtol=1e-5, atol=1e-6)
    server, asks = sb.Server("llama", bank, slots=1, rank=2), {key: batch[key][:2, :3] for key in ("input_ids", "attention_mask")}
    alone = torch.cat([sb.load(ref, bank).predict(asks, max_new_tokens=3)[:1] for ref in ("one", "llama")])
    assert torch.equal(server.predict({key: value[:1].expand(2, -1) for key, value in asks.items()}, ["one", "llama"], max_new_tokens=3), alone)
    assert task(tokenizer="one", bank=bank).tokenizer("ab").input_ids == made.tokenizer("ab").input_ids


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:fan_in_fan_out")  # of transformers about itself, of PEFT about Conv1D
@pytest.mark.parametrize("kind", NETS)
def test_exports_say_the_same_in_transformers_and_peft(tmp_path, kind):
    made, bank = task(), sb.Bank(tmp_path / "bank")
    model = model_of(kind)
    conf = {"_target_": "skillbank.models.transformer.CausalLM", "net": {"model_type": kind, **NETS[kind]}, **made.dimensions}
    bank.put(sb.Base(conf, model.state_dict()), "base")
    for seed in range(2):
        trained = sb.load("base", bank)
        torch.manual_seed(seed)
        params = sb.fresh(trained.net, rank=2)
        sb.fit(trained, made.batches(batch_size=4, seed=seed), params, steps=5, lr=1e-2, progress=False)
        bank.put(sb.read(trained.net), f"s{seed}", card={"base": "base"})
    assert not [name for name in bank.get("s0") if "lm_head" in name]
    bank.put(sb.Composition("base", ["s0", "s1"], merge={"method": "stack", "weights": [0.7, 0.5]}), "both")
    ids = torch.tensor([made.tokenizer("abc:").input_ids])
    for ref in ("s0", "both"):
        expected = sb.load(ref, bank).net(ids).logits
        assert not torch.allclose(expected, model.net(ids).logits)
        sb.export(ref, tmp_path / f"{ref}-merged", bank, merged=True)
        sb.export(ref, tmp_path / ref, bank)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / f"{ref}-merged", dtype="float32")
        close(plain(ids).logits, expected)
        assert AutoTokenizer.from_pretrained(tmp_path / f"{ref}-merged")("abc:").input_ids == ids[0].tolist()
        close(peft.PeftModel.from_pretrained(sb.load("base", bank).net, tmp_path / ref)(ids).logits, expected)


def test_the_first_kind_that_fits_is_what_a_record_is():
    tokenizer = tokenizer_of("bytes")
    tokenizer.chat_template = TEMPLATE
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert said(tokenizer, encoded(tokenizer, {"text": "abc", "completion": "z"}).ids) == "abc</s>"
    assert said(tokenizer, encoded(tokenizer, {"messages": turns, "completion": "z"}).ids) == "<user>a</s><assistant>b</s>"
    assert [answer_of(record) for record in ({"messages": turns, "completion": "z"}, {"prompt": "p", "completion": "c", "text": "t"})] == ["b", "c"]


LINES = {
    "line 2 is no JSON": '{"text": "a"}\n{',
    r"record 0: it has \['a'\]: give prompt and completion, messages or text, or say with columns": '{"a": "b"}',
    "record 1: its completion is empty, so there is nothing to learn": '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}',
    "record 0: prompt is a text, got int": '{"prompt": 1, "completion": "b"}',
    "record 0: a record is a mapping, got list": "[1]",
    r"record 0: messages is a list of \{role, content\}": '{"messages": [{"role": "user"}]}',
    "record 0: no message of the assistant says anything": '{"messages": [{"role": "user", "content": "a"}]}',
    "there are no records": "\n",
}


@pytest.mark.parametrize("message", LINES)
def test_bad_records(tmp_path, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(LINES[message])
    with pytest.raises(ValueError, match=message):
        read_records(path)


def test_records_from_everywhere(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    made = datasets.Dataset.from_list(RECORDS)
    made.to_parquet(tmp_path / "a.parquet")
    every = [read_records(tmp_path / name) for name in ("a.jsonl", "a.json", "a.parquet")] + [read_records(made), read_records(RECORDS)]
    assert all(records == RECORDS for records in every)
    renamed = [{"question": record["prompt"], "answer": record["completion"], "id": 1} for record in RECORDS]
    assert read_records(renamed, {"prompt": "question", "completion": "answer"}) == [{**record, "id": 1} for record in RECORDS]
    assert task(renamed, columns={"prompt": "question", "completion": "answer"}).data == task().data
    for row in ({"question": "q", "prompt": "p", "completion": "c"}, {"prompt": "p", "question": "q", "completion": "c"}):
        assert read_records([row], {"prompt": "question"}) == [{"prompt": "q", "completion": "c"}]
    swapped = {"prompt": "completion", "completion": "prompt"}
    assert read_records([{"prompt": "a", "completion": "b"}], swapped) == [{"prompt": "b", "completion": "a"}]
    lines = [{"text": "one\u2028two\x85three"}, {"text": "four"}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(record, ensure_ascii=False) + "\r\n" for record in lines), encoding="utf-8", newline="")
    assert read_records(tmp_path / "b.jsonl") == lines
    with pytest.raises(FileNotFoundError, match=r"there are no examples at 'nowhere.jsonl': give a .jsonl, .json or .parquet file"):
        read_records("nowhere.jsonl")
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(ValueError, match=r"a.csv' is none of .jsonl, .json and .parquet"):
        read_records(tmp_path / "a.csv")


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="8 records, 8 are to be trained on beside 2 held out"):
        task(examples=8, held_out=2)
    with pytest.raises(ValueError, match="4 records are longer than length=30 tokens, record 4 is the first, with 32"):
        task(length=30)
    with pytest.raises(ValueError, match="held_out at least 0 and length at least 2, got"):
        task(held_out=-1)
    with pytest.raises(ValueError, match=r"has no tokenizer: give task\.tokenizer=<base>"):
        task(tokenizer=None)
    with pytest.raises(ValueError, match="no tokenizer 'no/where': there is no such folder, no such version"):
        task(tokenizer="no/where", bank=tmp_path)
    with pytest.raises(ValueError, match="the tokenizer has no chat template: give the task one as chat_template"):
        task([{"messages": [{"role": "assistant", "content": "a"}]}])
    with pytest.raises(ValueError, match="batches need a batch size of at least 1"):
        task().batches(batch_size=0, seed=0)
    with pytest.raises(ValueError, match="holds out no records: set held_out"):
        task().validation(batch_size=2)
    with pytest.raises(ValueError, match="has no records to evaluate: give it test records, or held_out"):
        task().evaluate(model_of())
    bank = sb.Bank(tmp_path)
    other = {"_target_": "skillbank.models.diffusion.DiffusionPolicy", "observation_dim": 3, "action_dim": 2, "width": 16, "blocks": 1}
    from skillbank.load import build

    bank.put(sb.Base(other, build(other).state_dict()), "policy")
    with pytest.raises(ValueError, match="the base of 'policy' has no tokenizer: it is no language model"):
        task(tokenizer="policy", bank=bank)
    model = model_of()
    with pytest.raises(ValueError, match="65 tokens are more than the 64 that LlamaForCausalLM can take"):
        model.predict({"input_ids": torch.zeros(1, 60, dtype=torch.long)}, max_new_tokens=5)
    with pytest.raises(
        ValueError, match="token 400 is not among the 258 that LlamaForCausalLM knows: the text was cut up by the tokenizer of another"
    ):
        model({"input_ids": torch.full((1, 3), 400)})
    with pytest.raises(ValueError, match="CausalLM has no tokenizer of its own: give one, see tokenizer_of"):
        complete(CausalLM(model.net), ["a"])
    with pytest.raises(ValueError, match="packed rows are for training"):
        model.predict(next(task(pack=True).batches(batch_size=4, seed=0)(0)))
