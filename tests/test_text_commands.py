"""train.py and compose.py on text, from a base that starts anew to gates of every kind, and all of it made again."""

import json
import re
from itertools import islice

import pytest
import torch

import skillbank as sb
from compose import compose
from skillbank.recipe import task_of
from tests.test_configs import composed
from train import train

TINY = ["model.net.hidden_size=16", "model.net.intermediate_size=24", "model.net.num_hidden_layers=2", "model.net.num_attention_heads=2"]
FEW = ["task=text", "fit.steps=20", "batch_size=8", "task.held_out=4", "task.length=32", "episodes=4", "bank=bank"]
ANSWERS = {"reverse": lambda word: word[::-1], "double": lambda word: word + word}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, answer in ANSWERS.items():
            words = [
                "".join(letters) * (1 + i % 2) for i, letters in enumerate(zip("abcdefghij" * 4, "klmnopqrst" * 4, "aabbccddee" * 4, strict=True))
            ][:24]
            records = [{"prompt": f"{name} {word}:", "completion": answer(word)} for word in words]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        base = ["task.name=base", "task.data=reverse.jsonl", "task.tokenizer=bytes", "fit=base", "model=causal"]
        assert train(composed("train", *FEW, *base, *TINY)) == "base@1"
        for name in ANSWERS:
            skill = [f"task.name={name}", f"task.data={name}.jsonl", "base=base", "lora.rank=2"]
            assert train(composed("train", *FEW, *skill)) == f"{name}@1"
        yield folder


@pytest.mark.parametrize(
    ("gate", "kind", "options"),
    [
        ("mlp", "MLPGate", ["gate.hidden=[8]"]),
        ("mlp", "MLPGate", ["gate.hidden=[8]", "gate.view={tokens:true}"]),
        ("mlp", "MLPGate", ["gate.hidden=[8]", "gate.view={layer:1}"]),
        ("mlp", "MLPGate", ["gate.hidden=[8]", "gate.k=1", "gate.init=uniform"]),
        ("prototypes", "Prototypes", ["gate.k=1"]),
        ("prototypes", "Prototypes", ["gate.view={layer:1}"]),
        ("arrow", "Arrow", ["gate.k=1"]),
        ("constant", "ConstantGate", []),
    ],
)
def test_every_gate_is_made_reported_kept_and_made_again(home, monkeypatch, capsys, gate, kind, options):
    monkeypatch.chdir(home)
    name = re.sub(r"\W+", "-", f"{gate} {' '.join(options)}").strip("-")
    skills = ["task.name=both", "task.data=double.jsonl", "skills=[reverse,double]", f"name={name}"]
    ref = compose(composed("compose", *FEW, *skills, f"gate={gate}", *options))
    out = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")][2:]
    assert rows == ["base, untouched", "reverse@1, untouched", "double@1, untouched", ref]
    report = next(line.removeprefix("report: ") for line in out.splitlines() if line.startswith("report: "))
    assert "double@1" in (home / report).read_text()
    bank = sb.Bank("bank")
    composition, card = bank.get(ref), bank.card(ref)
    assert composition.gate["_target_"].endswith(kind)
    assert set(card.data) == ({"reverse.jsonl", "double.jsonl"} if gate == "prototypes" else {"double.jsonl"})
    assert sb.rebuild(ref, bank).equal
    loaded = sb.load(ref, bank)
    assert len(sb.complete(loaded, ["double ab:", "reverse abc:"], max_new_tokens=3)) == 2


def test_padding_does_not_count_in_what_a_gate_has_seen(home, monkeypatch):
    monkeypatch.chdir(home)
    bank, found = sb.Bank("bank"), {}
    skills = ["task.name=both", "task.data=double.jsonl", "skills=[reverse,double]", "report=false"]
    for gate in ("mlp", "prototypes"):
        untrained = ["gate.view={tokens:true}", "fit.steps=0", "episodes=0"]
        ref = compose(composed("compose", *FEW, *skills, f"name=padded-{gate}", f"gate={gate}", *untrained))
        found[gate] = bank.get(ref).tensors
    words, contexts = sb.load("base", bank).net.get_input_embeddings(), {}
    for name, count in (("double", 8), ("reverse", 8), ("both", 40)):
        batches = task_of({"both": ref}.get(name, name), bank).batches(batch_size=8, seed=0)(0)
        contexts[name] = torch.cat([words(batch["input_ids"][batch["attention_mask"] > 0]) for batch in islice(batches, count)]).detach()
    torch.testing.assert_close(found["mlp"]["mean"], contexts["both"].mean(0))
    torch.testing.assert_close(found["mlp"]["deviation"], contexts["both"].std(0))
    torch.testing.assert_close(found["prototypes"]["places"], torch.stack([contexts["reverse"].mean(0), contexts["double"].mean(0)]))


def test_weights_of_a_merge_are_searched_for(home, monkeypatch):
    monkeypatch.chdir(home)
    made = ["task.name=both", "task.data=double.jsonl", "skills=[reverse,double]", "name=searched", "merge=stack", "weights=search", "report=false"]
    ref = compose(composed("compose", *FEW, *made))
    bank = sb.Bank("bank")
    weights = bank.get(ref).merge["weights"]
    assert len(weights) == 2
    assert any(weights)
    assert set(bank.card(ref).data) == {"double.jsonl"}
    assert bank.card(ref).conf["weights"] == weights
    assert sb.rebuild(ref, bank).equal


def test_a_skill_may_start_where_the_inputs_vary_most(home, monkeypatch):
    monkeypatch.chdir(home)
    made = ["task.name=eva", "task.data=double.jsonl", "base=base", "lora.rank=2", "lora.init=eva"]
    bank, ref = sb.Bank("bank"), train(composed("train", *FEW, *made))
    assert bank.get(ref).ranks == bank.get("double").ranks
    assert sb.rebuild(ref, bank).equal
    assert not torch.equal(bank.get(ref)[next(iter(bank.get(ref)))][0], bank.get("double")[next(iter(bank.get(ref)))][0])


def test_bases_and_skills_are_made_again(home, monkeypatch):
    monkeypatch.chdir(home)
    bank = sb.Bank("bank")
    for ref in ("base", "reverse"):
        assert sb.rebuild(ref, bank).equal
    assert bank.card("reverse").conf["task"]["tokenizer"] == "base@1"
    assert bank.verify() == []


def test_a_task_is_tied_to_the_bank_in_use_and_to_the_exact_base(home, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ANSWERS:
        (tmp_path / f"{name}.jsonl").symlink_to(home / f"{name}.jsonl")
    bank = sb.Bank("elsewhere")
    bank.pull(str(home / "bank"), "reverse", "double")
    card, base = bank.card("reverse"), bank.get("base@1")
    older = {**card.conf, "task": {**card.conf["task"], "tokenizer": "base"}}
    bank.put(bank.get("reverse"), "older", card={"conf": older, "base": "base@1"})
    newer = {**base.model, "tokenizer": {**base.model["tokenizer"], "eos_token": "<pad>"}}
    assert str(bank.put(sb.Base(newer, base.tensors), "base")) == "base@2"
    for ref in ("reverse", "older"):
        assert task_of(ref, bank).tokenizer.eos_token == "</s>"
        assert sb.rebuild(ref, bank).equal
    assert task_of("reverse", sb.Bank(f"file://{tmp_path}/elsewhere")).tokenizer.eos_token == "</s>"
    gate = ["task.name=both", "task.data=double.jsonl", "skills=[reverse,double]", "gate=prototypes", "episodes=0"]
    ref = compose(composed("compose", *FEW, *gate, "bank=elsewhere"))
    assert bank.card(ref).conf["task"]["tokenizer"] == "reverse@1"
    assert sb.rebuild(ref, bank).equal
