"""Classifiers: what they compute, what skills of them adapt, records with labels, and the two commands on them."""

import json
import runpy

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, BertTokenizerFast

import skillbank as sb
from skillbank.evaluation import evaluate
from skillbank.gate import MLPGate
from skillbank.mixture import see
from skillbank.model import check_model
from skillbank.models.encoder import Classifier
from skillbank.tasks.labels import LabelTask, classes_of
from skillbank.tasks.tokens import tokenizer_of
from skillbank.tokenizer import kept, restored
from tests.commands import ROOT
from tests.test_configs import composed
from tests.tiny import close

NETS = {
    "bert": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    "roberta": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    "distilbert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
}
LETTERS = "abc"


def records(count, shift=0):
    """Texts of one letter each between others, of the class of that letter, or of the one that comes `shift` after it."""
    generator = torch.Generator().manual_seed(count)
    found = []
    for _ in range(count):
        kind, length, place = (int(torch.randint(high, (1,), generator=generator)) for high in (3, 5, 3))
        found.append({"text": "x" * place + LETTERS[kind] + "y" * length, "label": LETTERS[(kind + shift) % 3], "place": place})
    return found


def task(data=None, **options):
    return LabelTask(**{"name": "test/labels", "data": data or records(60), "tokenizer": "bytes", "length": 32, **options})


def model_of(kind="bert", **options):
    torch.manual_seed(0)
    net = {"model_type": kind, "initializer_range": 0.3, "max_position_embeddings": 40, **NETS[kind]}
    return Classifier(net, **{"classes": list(LETTERS), "tokenizer": kept(tokenizer_of("bytes")), **options}).eval()


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_padding_changes_nothing_and_is_on_the_right(kind):
    model, length = model_of(kind), 6
    pad = model.net.config.pad_token_id
    rows = [torch.randint(4, 40, (n,), generator=torch.Generator().manual_seed(n)) for n in (6, 3, 1)]
    alone = torch.cat([model.losses({"input_ids": row[None], "label": torch.tensor([1])}) for row in rows])
    ids = torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=pad) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (0, length - len(row))) for row in rows])
    batch = {"input_ids": ids, "attention_mask": mask, "label": torch.ones(3, dtype=torch.long)}
    torch.testing.assert_close(model.losses(batch), alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="a row begins with padding, where many classifiers look first: pad rows on the right"):
        model.predict({"input_ids": ids.flip(1), "attention_mask": mask.flip(1)})


def skills_of(model, count):
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in sb.fresh(model.net, rank=2):
                parameter.normal_(std=0.3)
        found.append(sb.read(model.net))
    sb.attach(model.net, found[0])
    return found


@pytest.mark.parametrize("kind", NETS)
def test_the_loss_is_that_of_each_text_by_itself(kind):
    model, made = model_of(kind).double(), task()
    batch = next(made.batches(batch_size=8, seed=0)(0))
    check_model(model, batch)
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 1
    losses, context, said = model.losses(batch), model.context(batch), model.predict(batch)
    assert (losses.shape, context.shape, said.shape) == ((8,), (8, 16), (8, 1))
    torch.testing.assert_close(model(batch), losses.mean())
    for row in range(8):
        ids = batch["input_ids"][row : row + 1, : int(batch["attention_mask"][row].sum())]
        logits = model.net(ids).logits.log_softmax(-1)[0]
        torch.testing.assert_close(losses[row], -logits[batch["label"][row]], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(context[row], model.net.get_input_embeddings()(ids)[0].mean(0), rtol=1e-9, atol=1e-12)
        assert int(said[row]) == int(logits.argmax())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # of transformers about itself
@pytest.mark.parametrize("kind", NETS)
def test_a_skill_adapts_the_body_and_leaves_the_head(tmp_path, kind):
    model = model_of(kind)
    (skill,) = skills_of(model, 1)
    assert len(skill) == (14 if kind == "llama" else 12)
    assert not [name for name in skill for head in ("classifier", "pooler", "score") if head in name]
    batch = next(task().batches(batch_size=8, seed=0)(0))
    expected = model.net(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    sb.write_adapter(skill, tmp_path)
    plain = model_of(kind)
    assert not torch.allclose(plain.net(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, expected)
    loaded = peft.PeftModel.from_pretrained(plain.net, tmp_path).eval()
    close(loaded(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, expected)
    assert len(sb.fresh(model.net, targets=["dense"] if kind in ("bert", "roberta") else ".*(score|classifier)", rank=2)) > 0


@pytest.mark.parametrize("tokens", [False, True])
def test_a_gate_per_text_or_token(tokens):
    model = model_of()
    skills = skills_of(model, 2)
    torch.manual_seed(3)
    gate = MLPGate(16, 2, hidden=(8,))
    torch.nn.init.normal_(gate.head.weight, std=2.0)
    see(model, {"tokens": tokens})
    composed = sb.Composed(model, gate, skills)
    batch = next(task().batches(batch_size=8, seed=0)(0))
    check_model(composed, batch)
    weights = composed.weights(batch)
    assert weights.shape == ((8, batch["input_ids"].shape[1], 2) if tokens else (8, 2))
    composed(batch)
    said, rows = composed.predict(batch), {key: batch[key] for key in ("input_ids", "attention_mask")}
    with composed.live():
        logits = model.net(**rows).logits
        assert torch.equal(model.net(rows["input_ids"], rows["attention_mask"]).logits, logits)
    assert torch.equal(logits.argmax(-1, keepdim=True), said)
    composed(batch)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, batch["label"]), composed(batch))
    weighted = torch.stack([sb.Composed(model_of(), sb.ConstantGate(16, 2), skills)(batch), composed(batch)])
    assert not torch.allclose(*weighted)


def test_training_and_accuracy():
    made = task(held_out=20)
    model = model_of()
    before = made.evaluate(model)
    sb.fit(model, made.batches(batch_size=16, seed=0), model.parameters(), steps=60, lr=1e-2, ema=None, progress=False)
    after = made.evaluate(model)
    assert (after["accuracy"], after["examples"]) == (1.0, 20.0)
    assert after["loss"] < 0.2 < before["loss"]
    assert before["accuracy"] < 0.8
    assert made.evaluate(model, episodes=3)["examples"] == 3.0
    groups = made.by("place")
    assert sum(group.evaluate(model)["examples"] for group in groups.values()) == 20.0
    right = sum(made.classes[int(model.predict(made._rows(made._encoded([record])))[0, 0])] == record["label"] for record in made.held_out)
    assert right == 20


def test_classes_are_those_trained_on_and_belong_to_the_data():
    made = task([{"text": str(i), "label": i} for i in (10, 9, 100, 9)])
    assert made.classes == ["9", "10", "100"]
    assert made.dimensions["classes"] == made.classes
    batch = next(made.batches(batch_size=4, seed=0)(0))
    assert {len(str(made.classes[label])): label for label in batch["label"].tolist()} == {1: 0, 2: 1, 3: 2}
    assert task(records(9)).data != task(records(9, shift=1)).data
    renamed = [{"words": record["text"], "kind": record["label"]} for record in records(9)]
    assert task(renamed, columns={"text": "words", "label": "kind"}).data == task(records(9)).data
    assert repr(made) == "LabelTask('test/labels', 'records', 4 records)"
    assert task(records(9), classes=["z", *LETTERS]).classes == ["z", *LETTERS]


def test_an_encoder_without_a_head_gets_one(tmp_path):
    """From a folder, with a tokenizer that puts its own tokens around a text; what a base keeps of it is the same."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    tokenizer.save_pretrained(tmp_path / "bert")
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=40, **NETS["bert"])).save_pretrained(tmp_path / "bert")
    made = task([{"text": "a b", "label": "one"}, {"text": "c", "label": "two"}], tokenizer=str(tmp_path / "bert"))
    batch = next(made.batches(batch_size=2, seed=0)(0))
    assert sorted(row.tolist() for row in batch["input_ids"]) == [[2, 5, 6, 3], [2, 7, 3, 0]]
    again = restored(kept(made.tokenizer))
    assert again("a b").input_ids == [2, 5, 6, 3]
    assert (again.cls_token, again.mask_token_id) == ("[CLS]", 4)
    model = Classifier(str(tmp_path / "bert"), classes=made.classes).eval()
    assert (model.classes, model.net.config.num_labels) == (["one", "two"], 2)
    check_model(model, batch)
    model.save_pretrained(tmp_path / "whole")
    whole = Classifier(str(tmp_path / "whole")).eval()
    assert whole.classes == ["one", "two"]
    assert torch.equal(whole.losses(batch), model.losses(batch))
    assert Classifier(whole.net).classes == ["one", "two"]
    with pytest.raises(ValueError, match=r"whole' has a head for other classes than \['a', 'b', 'c'\]: give ignore_mismatched_sizes=True"):
        Classifier(str(tmp_path / "whole"), classes=list(LETTERS))
    assert Classifier(str(tmp_path / "whole"), classes=list(LETTERS), ignore_mismatched_sizes=True).net.config.num_labels == 3


def test_the_commands_train_and_compose(tmp_path, monkeypatch):
    """A base on three letters, two skills that say others in their place, and a gate over them."""
    monkeypatch.chdir(tmp_path)
    for name, shift in (("one", 0), ("two", 1), ("three", 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(80, shift)))
    common = ["task=labels", "bank=bank", "task.held_out=20", "task.length=32", "batch_size=16", "fit.precision=no", "+fit.device=cpu", "episodes=20"]
    small = [f"model.net.{key}={value}" for key, value in {**NETS["bert"], "max_position_embeddings": 40}.items()]
    base = [
        *common,
        "model=classifier",
        "fit=base",
        "task.tokenizer=bytes",
        *small,
        "+model.net.initializer_range=0.3",
        "fit.steps=60",
        "fit.lr=1e-2",
    ]
    train = runpy.run_path(str(ROOT / "train.py"))["train"]
    assert train(composed("train", *base, "+fit.ema=null", "task.name=letters", "task.data=one.jsonl")) == "letters@1"
    for name, start in {"two": "lora.init=null", "three": "lora.init=pissa"}.items():
        skill = [*common, "base=letters", f"task.name={name}", f"task.data={name}.jsonl", "lora.rank=4", "lora.scale=2", start, "fit.steps=150"]
        assert train(composed("train", *skill, "fit.lr=1e-2", "+fit.ema=null")) == f"{name}@1"
    gate = [*common, "skills=[two,three]", "gate=mlp", "gate.hidden=[8]", "task.name=three", "task.data=three.jsonl", "fit.steps=5"]
    compose = runpy.run_path(str(ROOT / "compose.py"))["compose"]
    assert compose(composed("compose", *gate, "name=both", "report=false")) == "both@1"
    bank, made = sb.Bank(tmp_path / "bank"), task(records(80, 2), held_out=20)
    accuracy = {name: made.evaluate(sb.load(name, bank))["accuracy"] for name in ("letters", "two", "three", "both")}
    assert [bank.card(name).metrics["accuracy"] for name in ("letters", "three", "both")] == [1.0, accuracy["three"], accuracy["both"]]
    assert min(accuracy["three"], accuracy["both"]) >= 0.85
    assert max(accuracy["letters"], accuracy["two"]) < 0.5  # base and other skill say other letters
    assert classes_of("both", bank) == sb.load("both", bank).model.classes == list(LETTERS)
    assert bank.verify() == []
    assert [set(bank.get(name).ranks.values()) for name in ("two", "three")] == [{4}, {8}]
    assert sb.load("two", bank).tokenizer("ab").input_ids == tokenizer_of("bytes")("ab").input_ids
    made = task(records(80, 1), classes="two", tokenizer="two", bank=bank, held_out=20)
    assert made.evaluate(sb.load("two", bank))["accuracy"] >= 0.85
    (row,) = [row for row in evaluate(["two"], bank, by="place") if row["place"] == "all"]
    assert (row["accuracy"] >= 0.85, row["examples"]) == (True, 20.0)
    sb.export("two", tmp_path / "merged", bank, merged=True)
    plain, batch = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged"), next(made.batches(batch_size=8, seed=0)(0))
    assert plain.config.id2label == dict(enumerate(LETTERS))
    logits = plain(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, batch["label"]), sb.load("two", bank)(batch), rtol=1e-4, atol=1e-5)


BAD = {
    r"record 0: it has \['prompt'\]: give text and label, or say with columns=\{'text': \.\.\.\} what they are called": {"prompt": "a"},
    "record 0: label is a text or a whole number, got NoneType": {"text": "a", "label": None},
    "record 0: text is a text, got int": {"text": 1, "label": "a"},
    "record 0: its label is empty, so there is nothing to learn": {"text": "a", "label": ""},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_records(message):
    with pytest.raises(ValueError, match=message):
        task([BAD[message]])


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"label 'c' is none of the classes \['a', 'b'\], which are the base's or those trained on"):
        task(classes=["a", "b"])
    with pytest.raises(ValueError, match=r"label 'd' is none of the classes \['a', 'b', 'c'\]"):
        task(test=[{"text": "d", "label": "d"}])
    bank = sb.Bank(tmp_path)
    causal = {"_target_": "skillbank.models.transformer.CausalLM", "net": {"model_type": "llama", **NETS["llama"]}, **task().dimensions}
    del causal["classes"]
    bank.put(sb.Base(causal, {"net": torch.zeros(1)}), "text")
    with pytest.raises(ValueError, match="the base of 'text' has no classes, it is no classifier: train one with fit=base model=classifier"):
        task(classes="text", bank=bank)
    with pytest.raises(ValueError, match=r"a classifier needs at least 2 classes, as many as its head has \(1\), got \['a'\]"):
        model_of(classes=["a"])
    with pytest.raises(ValueError, match=r"as many as its head has \(3\), got \['a', 'b'\]"):
        Classifier(model_of().net, classes=["a", "b"])
    with pytest.raises(ValueError, match="no classifier at '/nowhere', neither as a folder nor on the Hub"):
        Classifier("/nowhere")
    model, rows = model_of(), {"input_ids": torch.zeros(2, 3, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"label 3 is none of the 3 classes \['a', 'b', 'c'\]: the task has the classes of another base"):
        model({**rows, "label": torch.tensor([0, 3])})
    with pytest.raises(ValueError, match="41 tokens are more than the 40 that BertForSequenceClassification can take"):
        model.predict({"input_ids": torch.zeros(2, 41, dtype=torch.long)})
    with pytest.raises(ValueError, match="token 400 is not among the 258"):
        model.context({"input_ids": torch.full((1, 3), 400)})
    with pytest.raises(ValueError, match="Classifier has no 'layer'"):
        see(model, {"layer": 1})
