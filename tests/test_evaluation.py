"""`skillbank eval`: on a version's own task, on another's, on examples and their kinds."""

import json
import math

import pytest
import torch

import skillbank as sb
from skillbank.cli import main
from skillbank.evaluation import evaluate, forget
from skillbank.tasks.records import read_records
from skillbank.tasks.text import TextTask
from skillbank.tasks.tokens import encoded
from tests.test_text import NETS, RECORDS, task


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    records = [{**record, "size": "short" if i < 2 else "long"} for i, record in enumerate(RECORDS[:4])]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    bank, made = sb.Bank(folder / "bank"), task(RECORDS[:4])
    conf = {"_target_": "skillbank.models.transformer.CausalLM", "net": {"model_type": "llama", **NETS["llama"]}, **made.dimensions}
    torch.manual_seed(0)
    from skillbank.load import build

    base = build(conf)
    other = [{**record, "completion": record["completion"][:3] + "!"} for record in RECORDS[:4]]
    sb.fit(base, task(other).batches(batch_size=4, seed=0), base.parameters(), steps=100, lr=1e-2, ema=None, progress=False)
    bank.put(sb.Base(conf, base.state_dict()), "base")
    model = sb.load("base", bank)
    sb.fit(model, task(RECORDS[:2]).batches(batch_size=2, seed=0), sb.fresh(model.net, rank=8), steps=200, lr=5e-3, ema=None, progress=False)
    own = {"_target_": "skillbank.tasks.text.TextTask", "name": "short", "data": str(folder / "records.jsonl"), "tokenizer": "base"}
    own |= {"bank": str(bank.root), "examples": 2, "test": str(folder / "records.jsonl")}
    bank.put(sb.read(model.net), "short", card={"base": "base", "conf": {"task": own}})
    return folder


def test_rows(home):
    bank = sb.Bank(home / "bank")
    rows = evaluate(["base", "short"], bank, task="short")
    assert [(row["ref"], row["task"], row["exact"], row["examples"]) for row in rows] == [
        ("base@1", "short", 0.0, 4.0),
        ("short@1", "short", 0.5, 4.0),
    ]
    assert rows[1:] == evaluate(["short"], bank)
    every = evaluate(["short"], bank, examples=home / "records.jsonl", by="size")
    assert [(row["size"], row["examples"]) for row in every] == [("all", 4.0), ("short", 2.0), ("long", 2.0)]
    assert every[1]["exact"] == 1.0
    assert every[0]["exact"] == (every[1]["exact"] + every[2]["exact"]) / 2
    assert every[0]["loss"] == pytest.approx((every[1]["loss"] + every[2]["loss"]) / 2, rel=1e-5)
    whole = TextTask(name="all", data=RECORDS[:4], test=RECORDS[:4], tokenizer="short", bank=bank)
    assert whole.evaluate(sb.load("short", bank)) == pytest.approx({key: every[0][key] for key in ("exact", "loss", "examples")})


def test_command(home, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["skillbank", "eval", "short", "--bank", str(home / "bank"), "--by", "size", "--json"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    assert [row["size"] for row in json.loads(capsys.readouterr().out)] == ["all", "short", "long"]


def test_bad_input(home, tmp_path):
    bank = sb.Bank(home / "bank")
    with pytest.raises(ValueError, match=r"evaluate on a task or on examples, got task='short' and examples='a.jsonl'"):
        evaluate(["short"], bank, task="short", examples="a.jsonl")
    with pytest.raises(ValueError, match=r"the card of 'base@1' names no task: only train.py and compose.py write one there"):
        evaluate(["base"], bank)
    with pytest.raises(ValueError, match=r"record 0 of those that evaluate has no 'kind': it has \['completion', 'prompt', 'size'\]"):
        evaluate(["short"], bank, by="kind")
    with pytest.raises(FileNotFoundError, match=r"there are no examples at 'nowhere.jsonl'"):
        evaluate(["short"], bank, examples="nowhere.jsonl")
    with pytest.raises(ValueError, match=r"task 'walker/walk' has no records to group by 'kind': leave by out"):
        evaluate(["walker/walk"], sb.Bank("adapters"), by="kind", episodes=1)


HARNESS = """
task: reverse
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: "{{completion}}"
target_delimiter: ""
output_type: OUTPUT
MORE
metric_list: [{metric: METRIC}]
"""


@pytest.mark.parametrize("gated", [False, True])
def test_the_harness_runs_what_the_bank_has(home, tmp_path, gated):
    """Its log likelihoods and answers are ours, also under a gate."""
    pytest.importorskip("lm_eval")
    from skillbank.evaluation import run_harness

    bank, ref = sb.Bank(home / "bank"), "short"
    if gated:
        gate = sb.MLPGate(16, 1, hidden=(4,))
        torch.nn.init.normal_(gate.head.weight)
        conf = {"_target_": "skillbank.gate.MLPGate", "context_dim": 16, "skills": 1, "hidden": [4]}
        ref = bank.put(sb.Composition("base", ["short"], gate=conf, tensors=gate.state_dict()), "gated")
    for name, output, metric in (("said", "generate_until", "exact_match"), ("likely", "loglikelihood", "perplexity")):
        task_file = HARNESS.replace("DATA", str(home / "records.jsonl")).replace("OUTPUT", output).replace("METRIC", metric)
        task_file = task_file.replace("MORE", 'generation_kwargs: {until: ["</s>"], max_gen_toks: 8}' if name == "said" else "")
        (tmp_path / f"{name}.yaml").write_text(task_file.replace("task: reverse", f"task: {name}"))
    rows = {row["task"]: row for row in run_harness([ref], bank, ["said", "likely"], include=tmp_path, batch_size=2)}
    (ours,) = evaluate([ref], bank, examples=home / "records.jsonl")
    assert rows["said"]["exact_match"] == ours["exact"]
    model = sb.load(str(ref), bank)
    logs = []
    for record in read_records(home / "records.jsonl"):
        ids = torch.tensor([encoded(task().tokenizer, record).ids[:-1]])
        batch = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(ids.shape[1]) < len(record["prompt"]), -100)}
        with torch.no_grad():
            if gated:  # the harness shows the model prompt and answer but for its last token, so that is what the gate sees
                model.mixture.cell.mix(model.weights({"input_ids": ids[:, :-1]}))
            logs.append(-float(getattr(model, "model", model).losses(batch)) * len(record["completion"]))
    assert rows["likely"]["perplexity"] == pytest.approx(math.exp(-sum(logs) / len(logs)), rel=1e-4)


def test_skills_together_at_every_level(home):
    bank, examples = sb.Bank(home / "bank"), home / "records.jsonl"
    levels = ["merge", "gate", "logits", "vote", "rerank", "in_context", "emulated"]
    rows = evaluate(["short", "short"], bank, examples=examples, levels=levels, large="base")
    assert [row["level"] for row in rows] == levels
    assert {row["ref"] for row in rows} == {"short@1 short@1"}
    alone = evaluate(["short"], bank, examples=examples)[0]
    for row in rows[:2]:  # half of it twice
        assert row["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    by_kind = evaluate(["short"], bank, examples=examples, levels=["merge"], by="size")
    assert [row["size"] for row in by_kind] == ["all", "short", "long"]
    with pytest.raises(ValueError, match="unknown level 'logit': did you mean 'logits'"):
        evaluate(["short"], bank, examples=examples, levels=["logit"])
    with pytest.raises(ValueError, match="level 'emulated' needs large: give large="):
        evaluate(["short"], bank, examples=examples, levels=["emulated"])


def said(capsys, monkeypatch, *words):
    """Rows that a command prints."""
    monkeypatch.setattr("sys.argv", ["skillbank", *words, "--json"])
    with pytest.raises(SystemExit, match="0"):
        main()
    return json.loads(capsys.readouterr().out)


def test_levels_on_the_command_line(home, capsys, monkeypatch):
    examples = str(home / "records.jsonl")
    rows = said(capsys, monkeypatch, "eval", "short", "--bank", str(home / "bank"), "--examples", examples, "--level", "merge,vote")
    assert [(row["ref"], row["level"]) for row in rows] == [("short@1", "merge"), ("short@1", "vote")]


def test_a_skill_is_forgotten(home, capsys, monkeypatch):
    bank, examples = sb.Bank(home / "bank"), str(home / "records.jsonl")
    rows = forget("short", bank, examples, examples, ways=["adjust", "abstain", "negate"], share=0.5)
    assert [(row["way"], row["set"]) for row in rows[::2]] == [(way, "forget") for way in ("before", "adjust", "abstain", "negate")]
    base = evaluate(["base"], bank, examples=examples)[0]
    assert rows[6]["loss"] == pytest.approx(base["loss"], rel=1e-4)
    assert rows[4]["exact"] == 0.0
    given = ("--bank", str(bank.root), "--examples", examples, "--retain", examples)
    found = said(capsys, monkeypatch, "forget", "base", *given, "--way", "negate", "--skill", "short")
    assert [row["way"] for row in found] == ["before", "before", "negate", "negate"]
    assert found[2]["loss"] != pytest.approx(found[0]["loss"], rel=1e-2)
    with pytest.raises(ValueError, match="'base' is no skill that could be subtracted: give one as skill"):
        forget("base", bank, examples, examples, ways=["negate"])
    with pytest.raises(ValueError, match="unknown way to forget 'adjusted': did you mean 'adjust'"):
        forget("base", bank, examples, examples, ways=["adjusted"])
