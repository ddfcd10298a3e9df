"""What ships with the repository: the bank, the demonstrations and the stored results are whole, and say what the README says."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from benchmarks.functions import SKILLS, alone, of_skill, pretraining
from skillbank import Bank, TextTask, attach, load
from skillbank.load import build_base
from skillbank.tasks.records import digest_of, read_records

ROOT = Path(__file__).parents[1]
BANK = Bank(ROOT / "adapters")
EXPECTED = {
    "walker/stand": "base",
    "walker/walk": "skill",
    "walker/run": "skill",
    "walker/walk-from-stand": "composition",
    "walker/run-from-stand": "composition",
    "walker/run-from-stand-walk": "composition",
    "walker/blend": "composition",
}
STRINGS = {"strings/base": "base", **{f"strings/{name.lower()}": "skill" for name in SKILLS}}
FILES = sorted(path.relative_to(BANK.root).as_posix() for path in BANK.root.rglob("*") if path.is_file() and not path.name.startswith("."))


def test_the_bank_holds_what_the_readme_names():
    assert {entry.ref.name: entry.card.kind for entry in BANK.list()} == EXPECTED | STRINGS


def test_the_bank_is_whole():
    assert BANK.verify() == []


@pytest.mark.parametrize("file", [file for file in FILES if file.count("/") > 1])
def test_a_flipped_byte_anywhere_is_found_and_named(tmp_path, file):
    name, version, leaf = file.rsplit("/", 2)
    shutil.copytree(BANK.root, tmp_path / "bank", ignore=shutil.ignore_patterns("walker" if name.startswith("strings") else "strings"))
    path = tmp_path / "bank" / file
    data = bytearray(path.read_bytes())
    data[random.Random(file).randrange(len(data))] ^= 1 << random.Random(leaf).randrange(8)
    path.write_bytes(data)
    problems = Bank(tmp_path / "bank").verify()
    assert (f"{name}@{version}", leaf) in {(str(problem.ref), problem.file) for problem in problems}
    with pytest.raises(ValueError, match=f"{name}@{version}"):
        Bank(tmp_path / "bank").get(f"{name}@{version}")


@pytest.mark.parametrize("name", ["walker/walk", "walker/run"])
def test_plain_peft_gives_our_outputs(name):
    policy = build_base(BANK.get("walker/stand")).eval()
    x = torch.randn(16, 6), torch.randn(16, 24), torch.arange(16) % 5
    untouched = policy.net(*x)
    attach(policy.net, BANK.get(name))
    ours = policy.net(*x)
    plain = build_base(BANK.get("walker/stand")).eval()
    theirs = PeftModel.from_pretrained(plain.net, BANK.path(name))(*x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - untouched).abs().max() > 0.1


@pytest.mark.parametrize("name", EXPECTED)
def test_every_version_loads_and_acts(name):
    model = load(name, BANK)
    action = model.predict({"observation": torch.randn(3, 24)})
    assert action.shape == (3, 1, 6)
    assert action.abs().max() <= 1


@pytest.mark.parametrize("name", EXPECTED)
def test_cards_say_where_everything_comes_from(name):
    card = BANK.card(name)
    assert card.conf["seed"] is not None
    assert card.data or card.conf["merge"], "a merge is made from skills alone"
    assert all(source.startswith("demos/walker/") for source in card.data)
    assert card.metrics["return"] > 100
    assert card.tools["torch"]
    if card.kind != "base":
        assert card.base["ref"] == "walker/stand@1"


def test_every_skill_of_strings_knows_its_function():
    """The base does not, and a skill does by itself and in chains with the base's functions; how well is in benchmarks/results/strings.jsonl."""
    shares = {}
    for name in SKILLS:
        records = [*alone(name, 10, 77), *[record for record in of_skill(name, 60, 77) if "," not in record["prompt"]][:30]]
        task = TextTask(name=name, data=records, test=records, tokenizer="strings/base", bank=BANK)
        shares[name] = task.evaluate(load(f"strings/{name.lower()}", BANK))["exact"]
        assert task.evaluate(load("strings/base", BANK), episodes=10)["exact"] < 0.2
        card = BANK.card(f"strings/{name.lower()}")
        assert card.base["ref"] == "strings/base@1"
        source = f"demos/strings/{name.lower()}.jsonl"
        assert card.data == {source: digest_of(of_skill(name, 600, 0))} == {source: digest_of(read_records(ROOT / source))}
        assert "/" not in card.conf["bank"]
    assert min(shares.values()) > 0.3
    assert sum(shares.values()) / len(shares) > 0.75


def test_the_base_of_strings_knows_its_chains():
    records = [record for record in pretraining(300, 77) if "," not in record["prompt"]]
    task = TextTask(name="base", data=records, test=records, tokenizer="strings/base", bank=BANK)
    assert task.evaluate(load("strings/base", BANK))["exact"] > 0.95


def test_stored_results_are_complete_rows():
    rows = [json.loads(line) for line in (ROOT / "benchmarks" / "results" / "psec_continual.jsonl").read_text().splitlines()]
    assert rows
    assert len({(row["name"], row["seed"]) for row in rows}) == len(rows)
    assert all(len(row["returns"]) == 10 and row["commit"] and row["data"] for row in rows)
