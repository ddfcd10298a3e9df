"""The bank: what goes in comes out bit-equal, a version never changes, and whatever is damaged is named."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from skillbank.bank import Bank, Base, Card, Composition, Ref, UnknownRef, base_fingerprint
from skillbank.bank.sealed import seal, unseal
from skillbank.skill import Skill, digest

MODEL = {"_target_": "torch.nn.Linear", "in_features": 6}


def skill_of(seed=0, modules=("a", "b.0")):
    generator = torch.Generator().manual_seed(seed)
    return Skill({name: (torch.randn(2, 6, generator=generator), torch.randn(4, 2, generator=generator)) for name in modules})


def base_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 6, generator=generator)
    return Base(MODEL, {"net.a.weight": weight, "net.b.0.weight": weight[:, :], "net.b.0.bias": torch.zeros(4), "scale": torch.ones(())})


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    bank = Bank(tmp_path_factory.mktemp("shipped"))
    bank.put(base_of(), "walker/stand", card={"conf": {"steps": 3}, "license": "apache-2.0"})
    card = {"base": "walker/stand", "data": {"demos": "ab" * 32}, "metrics": {"return": {"mean": 512.25}}, "tags": ["dmc"], "notes": "Walks."}
    bank.put(skill_of(1), "walker/walk", card=card)
    bank.put(skill_of(2), "walker/walk", card=card)
    bank.put(skill_of(3), "walker/run", card={"base": "walker/stand@1", "parents": [{"ref": "walker/walk", "weight": 0.5}]})
    merge = {"method": "svd", "weights": [0.75, 0.25], "rank": 2}
    bank.put(Composition("walker/stand", ("walker/walk@1", "walker/run"), merge=merge), "walker/both")
    gate = {"_target_": "skillbank.gate.MLPGate", "context_dim": 3}
    bank.put(Composition("walker/stand", ("walker/walk", "walker/run"), gate=gate, tensors={"w": torch.eye(3)}), "walker/gated")
    bank.alias("walker/walk", "best", 1)
    return bank


@pytest.fixture
def bank(shipped, tmp_path):
    return Bank(shutil.copytree(shipped.root, tmp_path / "bank"))


def files(bank):
    return sorted(path for path in bank.root.rglob("*") if path.is_file() and not path.name.startswith("."))


def test_put_then_get_is_bit_equal(bank):
    assert bank.get("walker/walk@2").fingerprint == skill_of(2).fingerprint
    base = bank.get("walker/stand")
    assert digest(base.tensors) == digest(base_of().tensors)
    assert base.model == MODEL
    both, gated = bank.get("walker/both"), bank.get("walker/gated")
    assert (both.base, both.skills, both.weights) == ("walker/stand@1", ("walker/walk@1", "walker/run@1"), [0.75, 0.25])
    assert gated.skills == ("walker/walk@2", "walker/run@1")
    assert gated.merge is None
    assert_close(gated.tensors["w"], torch.eye(3), rtol=0, atol=0)


def test_the_card_says_where_a_version_comes_from(bank):
    card = bank.card("walker/walk")
    fingerprint = base_fingerprint({"a.weight": base_of().tensors["net.a.weight"], "b.0.weight": base_of().tensors["net.b.0.weight"]}, ["b.0", "a"])
    assert card.base == {"ref": "walker/stand@1", "hash": bank.card("walker/stand").hash, "name": None, "fingerprint": fingerprint}
    assert card.metrics == {"return": {"mean": 512.25}}
    assert card.tools["torch"] == torch.__version__
    assert card.created.endswith("+00:00")
    assert [(parent["ref"], parent["weight"]) for parent in bank.card("walker/both").parents] == [("walker/walk@1", 0.75), ("walker/run@1", 0.25)]
    assert bank.card("walker/gated").base["fingerprint"] == fingerprint
    text = (bank.path("walker/walk") / "README.md").read_text()
    assert text.startswith('---\nlibrary_name: "peft"\ntags: ["skillbank", "skill", "dmc"]\n---\n')
    assert "| return.mean | 512.25 |" in text
    assert Card.from_bytes(card.to_bytes()) == card


def test_peft_loads_a_version(bank):
    from peft import PeftModel
    from torch import nn

    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Sequential(nn.Linear(6, 4))})
    weight = net["b"][0].weight.detach() + skill_of(2).delta("b.0")
    x = torch.randn(5, 6)
    expected = nn.functional.linear(x, weight, net["b"][0].bias)
    assert_close(PeftModel.from_pretrained(net, bank.path("walker/walk")).base_model.model["b"](x), expected)


def test_lineage(bank):
    tree = bank.lineage("walker/both")
    assert (tree["ref"], tree["kind"], tree["base"]["ref"]) == ("walker/both@1", "composition", "walker/stand@1")
    run = tree["parents"][1]
    assert (run["weight"], run["parents"][0]["ref"], run["parents"][0]["weight"]) == (0.25, "walker/walk@2", 0.5)


def test_base_of(bank):
    bank.put(skill_of(9), "foreign/skill", card={"base": {"name": "gpt2", "fingerprint": "ab"}})
    assert bank.base_of(["walker/walk", "walker/run", "walker/stand"]) == Ref("walker/stand", 1)
    with pytest.raises(ValueError, match="'foreign/skill@1' names no base"):
        bank.base_of(["foreign/skill"])
    bank.put(base_of(7), "walker/stand")
    bank.put(skill_of(8), "walker/hop", card={"base": "walker/stand"})
    with pytest.raises(ValueError, match=r"one common base is needed.*walker/stand@2"):
        bank.base_of(["walker/walk", "walker/hop"])


def test_put_is_idempotent_by_content(bank):
    before = files(bank)
    card = {"base": "walker/stand", "notes": "other words"}
    assert bank.put(skill_of(1), "walker/walk", card=card) == Ref("walker/walk", 1)
    assert bank.put(base_of(), "walker/stand") == Ref("walker/stand", 1)
    assert files(bank) == before
    assert bank.put(skill_of(1), "walker/other", card=card) == Ref("walker/other", 1)
    assert bank.put(skill_of(1), "walker/walk") == Ref("walker/walk", 3), "another base is another version"


@pytest.mark.parametrize(
    ("ref", "exact"),
    [
        ("walker/walk", "walker/walk@2"),
        ("walker/walk@1", "walker/walk@1"),
        ("walker/walk@best", "walker/walk@1"),
        (Ref("walker/run"), "walker/run@1"),
    ],
)
def test_resolve(bank, ref, exact):
    assert str(bank.resolve(ref)) == exact


def test_resolve_content(bank):
    content = bank.card("walker/walk@1").hash
    assert bank.resolve(f"@sha256:{content[:8]}") == bank.resolve(f"walker/walk@sha256:{content}") == Ref("walker/walk", 1)
    with pytest.raises(UnknownRef, match="no content 'walker/run@sha256:"):
        bank.resolve(f"walker/run@sha256:{content[:12]}")


def test_content_prefix_that_two_contents_share_is_refused(tmp_path, monkeypatch):
    hashes = iter(["abcd1" + "0" * 59, "abcd2" + "0" * 59])
    monkeypatch.setattr("skillbank.bank.store.content_hash", lambda _: next(hashes))
    bank = Bank(tmp_path)
    bank.put(skill_of(1), "a")
    bank.put(skill_of(2), "b")
    assert bank.resolve("@sha256:abcd2") == Ref("b", 1)
    with pytest.raises(ValueError, match=r"'@sha256:abcd' is ambiguous, it fits a@1 \(abcd1.*b@1"):
        bank.resolve("@sha256:abcd")


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("walker/wlak", "no 'walker/wlak' in .* did you mean 'walker/walk'"),
        ("zzz", "no 'zzz' in .* there is 'walker/both', 'walker/gated'"),
        ("walker", "no 'walker' in"),
        ("walker/walk@7", "'walker/walk' has no version 7 in Bank.*: there is 1, 2"),
        ("walker/walk@bset", "'walker/walk' has no alias 'bset' in Bank.*: did you mean 'best'"),
        ("walker/run@best", "'walker/run' has no alias 'best' in Bank.*: there is none yet"),
    ],
)
def test_unknown_refs(bank, ref, message):
    with pytest.raises(UnknownRef, match=message):
        bank.get(ref)


@pytest.mark.parametrize("ref", ["readme.md", "readme.md@1", "readme.md@best", "readme.md/below@1"])
def test_a_file_beside_the_names_is_none(bank, ref):
    (bank.root / "readme.md").write_text("What is in here.")
    with pytest.raises(UnknownRef, match=f"no '{ref.partition('@')[0]}' in"):
        bank.resolve(ref)
    assert bank.aliases("readme.md") == {}


def test_aliases_move(bank):
    assert bank.aliases("walker/walk") == {"best": 1}
    bank.alias("walker/walk", "best", 2)
    bank.alias("walker/walk", "first", 1)
    assert bank.aliases("walker/walk") == {"best": 2, "first": 1}
    with pytest.raises(UnknownRef, match="has no version 9"):
        bank.alias("walker/walk", "best", 9)
    with pytest.raises(ValueError, match="'7' is not an alias"):
        bank.alias("walker/walk", "7", 1)


def test_list(bank):
    assert [str(entry.ref) for entry in bank.list("skill")] == ["walker/run@1", "walker/walk@1", "walker/walk@2"]
    assert [str(entry.ref) for entry in bank.list(pattern="*/[bg]*")] == ["walker/both@1", "walker/gated@1"]
    with pytest.raises(ValueError, match="kind='gate': a bank holds base, skill, composition"):
        bank.list("gate")


def test_what_is_half_written_or_hidden_is_invisible(bank):
    before = [entry.ref for entry in bank.list()]
    for folder in (".tmp-x", "walker/walk/3", "walker/walk/4/.git", "walker/empty", "walker/.hidden/1"):
        (bank.root / folder).mkdir(parents=True)
    (bank.root / ".tmp-x" / "card.json").write_text("{}")
    assert [entry.ref for entry in bank.list()] == before
    assert bank.verify() == []
    assert bank.put(skill_of(5), "walker/walk") == Ref("walker/walk", 3)


def test_verify_names_what_stands_on_what_is_wrong(bank):
    path = bank.path("walker/walk@2") / "adapter_model.safetensors"
    path.write_bytes(b"")
    problem = next(each for each in bank.verify() if each.ref == "walker/walk@2")
    assert problem.affects == ("walker/both@1", "walker/gated@1", "walker/run@1")
    assert str(problem).endswith("(affects walker/both@1, walker/gated@1, walker/run@1)")


def test_verify_tells_how_far_it_is(bank):
    told = []
    bank.verify(done=lambda so_far, of: told.append((so_far, of)), workers=3)
    assert told == [(count, 6) for count in range(7)]


def test_intact(bank):
    assert bank.verify() == []
    assert bank.verify("walker/gated") == []


def test_every_flipped_byte_is_named(bank):
    generator = torch.Generator().manual_seed(0)
    targets = files(bank)
    assert {path.name for path in targets} >= {"card.json", "README.md", "aliases.json", "gate.safetensors", "adapter_config.json", "model.json"}
    for path in targets:
        good = path.read_bytes()
        places = {0, len(good) - 1, *torch.randint(len(good), (6,), generator=generator).tolist()}
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 1 << int(torch.randint(8, (), generator=generator))
            path.write_bytes(bad)
            relative = path.relative_to(bank.root)
            ref = "walker/walk" if path.name == "aliases.json" else f"{relative.parent.parent}@{relative.parent.name}"
            problems = bank.verify(None if place == 0 else ref)
            assert (ref, path.name) in {(problem.ref, problem.file) for problem in problems}, (path, place)
            if path.name != "aliases.json":
                with pytest.raises(ValueError, match=f"{ref}: {path.name}"):
                    bank.get(ref)
        path.write_bytes(good)
    assert bank.verify() == []


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda root: (root / "walker/walk/1/README.md").unlink(), r"walker/walk@1: README.md is missing"),
        (lambda root: (root / "walker/walk/1/card.json").unlink(), r"walker/walk@1: card.json is missing"),
        (lambda root: (root / "walker/walk/1/notes.txt").write_text(""), r"walker/walk@1: notes.txt is not in the card"),
        (lambda root: (root / "walker/walk/1/.x").write_text(""), r"walker/walk@1: .x is not in the card"),
        (lambda root: relink(root / "walker/walk/1/README.md"), r"walker/walk@1: README.md is no plain file"),
        (lambda root: (root / "walker/run").rename(root / "walker/ran"), r"walker/both@1: card.json names the parent 'walker/run@1', which is not"),
        (lambda root: swap(root / "walker/walk"), r"walker/run@1: card.json names the parent 'walker/walk@2' with content"),
        (
            lambda root: (root / "walker/stand/1/card.json").write_text("{}"),
            r"walker/walk@1: card.json names the base 'walker/stand@1', which is damaged",
        ),
        (lambda root: lie(root / "walker/walk/1", hash="ab" * 32), r"walker/walk@1: card.json has a content hash that its own files do not give"),
        (lambda root: lie(root / "walker/walk/1", format=2), r"walker/walk@1: card.json has format 2, this skillbank reads 1: update"),
        (lambda root: lie(root / "walker/walk/1", kind="gate"), r"walker/walk@1: card.json has a value of the wrong type in \['kind'\]"),
        (lambda root: lie(root / "walker/walk/1", extra=1), r"walker/walk@1: card.json has the fields"),
        (lambda root: lie(root / "walker/walk/1", files={"../x": {"sha256": "", "size": 0}}), r"walker/walk@1: card.json has an entry in files"),
        (lambda root: lie(root / "walker/walk/1", parents=[{"ref": 1}]), r"walker/walk@1: card.json has a parent that is no ref"),
        (lambda root: lie_base(root / "walker/walk/1"), r"walker/walk@1: card.json fits a base with fingerprint abab"),
        (lambda root: aliases(root, {"best": 9}), r"walker/walk: aliases.json points 'best' at version 9"),
    ],
)
def test_verify_names_what_is_wrong(bank, damage, problem):
    damage(bank.root)
    found = list(map(str, bank.verify()))
    assert any(re.match(problem, each) for each in found), found


def relink(path):
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def swap(folder):
    for old, new in (("1", "t"), ("2", "1"), ("t", "2")):
        (folder / old).rename(folder / new)


def lie(folder, **changes):
    (folder / "card.json").write_bytes(seal({**unseal((folder / "card.json").read_bytes()), **changes}))


def lie_base(folder):
    base = unseal((folder / "card.json").read_bytes())["base"]
    lie(folder, base={**base, "fingerprint": "ab" * 32})


def aliases(root, table):
    (root / "walker/walk/aliases.json").write_bytes(seal({"format": 1, "aliases": table}))


def test_a_composition_whose_parent_changed_is_not_read(bank):
    swap(bank.root / "walker/walk")
    with pytest.raises(ValueError, match=r"walker/both@1: card.json names the parent 'walker/walk@1' with content"):
        bank.get("walker/both")


@pytest.mark.parametrize(
    ("name", "card", "error", "message"),
    [
        ("Walk", {}, ValueError, "'Walk' is not a name"),
        ("walk", {"metric": {}}, ValueError, "no field 'metric': did you mean 'metrics'"),
        ("walk", {"metrics": [1]}, ValueError, r"card field 'metrics' is \[1\], it must be of type Mapping"),
        ("walk", {"tags": "dmc"}, ValueError, "card field 'tags' is 'dmc', it must be of type Sequence"),
        ("walk", {"base": {"name": "gpt2", "fingerprint": 3}}, ValueError, "has a base that is no ref, hash, name and fingerprint"),
        ("walk", {"parents": [{"ref": "walker/walk", "weight": float("inf")}]}, ValueError, "cannot be written as JSON"),
        ("walk", {"metrics": {"x": float("nan")}}, ValueError, "card field 'metrics' cannot be written as JSON"),
        ("walk", {"conf": {"x": torch.ones(1)}}, ValueError, "card field 'conf' cannot be written as JSON"),
        ("walk", {"base": "walker/stnad"}, UnknownRef, "did you mean 'walker/stand'"),
        ("walk", {"base": "walker/walk"}, ValueError, "'walker/walk@2' is a skill, a base is needed"),
        ("walk", {"base": {"fingerprint": "a"}}, ValueError, "give 'ref' for a base in the bank"),
        ("walk", {"base": {"ref": "walker/stand", "fingerprint": "abc"}}, ValueError, "the base has fingerprint abc, 'walker/stand@1' in the bank"),
        ("walk", {"parents": [{"name": "x"}]}, ValueError, "parent {'name': 'x'}: give a reference"),
        ("walk", {"parents": [{"ref": "walker/walk", "hash": "abc"}]}, ValueError, "'walker/walk@2' has content"),
        ("walk", {"parents": [{"ref": "walker/walk", "weight": "a"}]}, ValueError, "weight 'a' of 'walker/walk@2'"),
    ],
)
def test_cards_that_are_refused_leave_nothing(bank, name, card, error, message):
    before = sorted(bank.root.rglob("*"))
    with pytest.raises(error, match=message):
        bank.put(skill_of(4), name, card=card)
    assert sorted(bank.root.rglob("*")) == before


def test_a_skill_of_another_base_is_refused(bank):
    with pytest.raises(ValueError, match="the base has no module 'c' with a weight"):
        bank.put(skill_of(4, ("a", "c")), "walker/odd", card={"base": "walker/stand"})
    with pytest.raises(ValueError, match="a base has no base of its own"):
        bank.put(base_of(5), "walker/odd", card={"base": "walker/stand"})
    with pytest.raises(ValueError, match="a composition has its own base"):
        bank.put(bank.get("walker/both"), "walker/odd", card={"base": "walker/stand"})
    with pytest.raises(TypeError, match="a bank holds Skill, Base, Checkpoint and Composition, got dict"):
        bank.put({}, "walker/odd")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skills": ()}, "at least one skill"),
        ({}, "either a merge or a gate"),
        ({"merge": {}, "gate": {"_target_": "x"}}, "either a merge or a gate"),
        ({"merge": {"weights": [1.0]}}, "got 1 weights for 2 skills"),
        ({"merge": {}, "tensors": {"w": torch.ones(1)}}, r"this composition is a merge: \['w'\]"),
        ({"gate": {"target": "x"}}, r"needs the '_target_' that builds it, got the keys \['target'\]"),
    ],
)
def test_compositions_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Composition(**{"base": "b", "skills": ("s", "t"), **options})


def test_a_bank_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no bank at .*nowhere"):
        Bank(tmp_path / "nowhere").list()
    with pytest.raises(FileNotFoundError, match="no bank at"):
        Bank(tmp_path / "nowhere").get("walker/walk")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file' is a file: a bank is a folder"):
        Bank(tmp_path / "file")
    with pytest.raises(ValueError, match="'gopher://bucket' cannot be opened: Protocol not known"):
        Bank("gopher://bucket")
    with pytest.raises(PermissionError, match=r"the bank '.*inside' is not writable: Not a directory"):
        Bank(tmp_path / "file" / "inside").put(skill_of(), "walk")
    assert "~" not in str(Bank("~/bank").root)


def test_a_folder_that_cannot_be_written(bank, monkeypatch):
    def refuse(self, *_args, **_options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match="is not writable: Permission denied"):
        bank.put(skill_of(6), "walker/walk")


SETUP = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import torch
import skillbank.bank.publish as store
from skillbank.bank import Bank
from tests.test_bank import skill_of
torch.set_num_threads(1)
bank = Bank(sys.argv[1])

def processes(*runs):
    pids = []
    for run in runs:
        pid = os.fork()
        if not pid:
            run()
            sys.stdout.flush()
            os._exit(0)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
"""
RACE = """
def writer(shift):
    put = [f"{shift}:{bank.put(skill_of(100 + shift * (i % 6) + i // 6), 'walker/race')}\\n" for i in range(12)]
    os.write(1, "".join(put).encode())  # at once, so that the lines of the two do not mix

assert processes(lambda: writer(2), lambda: writer(3)) == [0, 0]
"""
KILLS = """
real = store.write_new

def kill_after(name):
    def write_new(path, data):
        if name is None:
            os.kill(os.getpid(), signal.SIGKILL)
        real(path, data)
        if path.name == name:
            os.kill(os.getpid(), signal.SIGKILL)

    store.write_new = write_new
    bank.put(skill_of(50), "walker/walk")

assert processes(*(lambda name=name: kill_after(name) for name in (None, "README.md", "card.json"))) == [-9, -9, -9]
"""


def apart(code, bank):
    """Run code in another process, which may start and lose its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", SETUP + code, str(bank.root)], env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def test_two_writers_of_one_name(tmp_path):
    bank = Bank(tmp_path)
    lines = apart(RACE, bank).split()
    numbers = bank.versions("walker/race")
    assert numbers == list(range(1, len(numbers) + 1))
    assert {f"walker/race@{number}" for number in numbers} == {line.partition(":")[2] for line in lines}
    hashes = [bank.card(Ref("walker/race", number)).hash for number in numbers]
    assert len(set(hashes)) == len(hashes), "the same content gets one version"
    assert bank.verify() == []
    assert not list(bank.root.glob(".tmp-*"))


def test_killed_before_the_rename(bank):
    before = [entry.ref for entry in bank.list()]
    apart(KILLS, bank)
    left = [path for path in bank.root.glob(".tmp-*") if path.is_dir()]
    assert len(left) == 3
    assert [entry.ref for entry in bank.list()] == before
    assert bank.gc(dry_run=True) == sorted(left)
    assert all(path.exists() for path in left)
    assert bank.gc() == sorted(left)
    assert not list(bank.root.glob(".tmp-*"))
    assert bank.verify() == []
    assert bank.put(skill_of(50), "walker/walk") == Ref("walker/walk", 3)


def test_listing_imports_no_torch_and_is_fast(bank):
    code = f"""
import sys, time
from skillbank.bank import Bank
start = time.perf_counter()
Bank({str(bank.root)!r}).list()
assert not {{"torch", "numpy", "peft", "transformers"}} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)
    started = time.perf_counter()
    for _ in range(20):
        bank.list()
    assert (time.perf_counter() - started) / 20 < 0.1


def test_card_keys_that_are_no_strings_are_stored_as_strings(bank):
    ref = bank.put(skill_of(60), "walker/keys", card={"conf": {10: 1, 2: (1, 2), "ä": None}})
    assert bank.card(ref).conf == {"10": 1, "2": [1, 2], "ä": None}
    assert json.loads((bank.path(ref) / "card.json").read_bytes())["conf"]["2"] == [1, 2]
