"""Banks from strangers: whatever their names, folders, cards and files say, what is wrong is refused by name and nothing else happens."""

import hashlib
import json
import os
import re
import shutil
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skillbank.bank import Bank, Card, Ref, UnknownRef
from skillbank.bank import index as indexing
from skillbank.bank.card import content_hash
from skillbank.bank.sealed import seal, unseal
from tests.test_bank import shipped, skill_of  # noqa: F401

A, B = (f"base_model.model.{module}.lora_{letter}.weight" for module, letter in (("a", "A"), ("a", "B")))
CONFIG = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}).encode()


@pytest.fixture
def bank(shipped, tmp_path):  # noqa: F811
    return Bank(shutil.copytree(shipped.root, tmp_path / "bank"))


def forge(bank, ref, contents=None, **fields):
    """Change files of a version, or take them away, and fields of its card, and make every hash and the seal right again."""
    folder = bank.path(ref)
    for name, data in (contents or {}).items():
        (folder / name).unlink(missing_ok=True)
        if data is not None:
            (folder / name).write_bytes(data)
    listed = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}
        for path in folder.iterdir()
        if path.name != "card.json"
    }
    card = {**unseal((folder / "card.json").read_bytes()), "files": listed, "hash": content_hash(listed), **fields}
    (folder / "card.json").write_bytes(seal(card))


def safetensors(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def tensor(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def refused(bank, ref, message):
    """Neither `get` nor `verify` lets a version pass, and neither raises anything else."""
    with pytest.raises(ValueError, match=message):
        bank.get(ref)
    assert any(re.search(message, str(problem)) for problem in bank.verify()), list(map(str, bank.verify()))


BAD = st.one_of(
    st.sampled_from(
        ["..", "../x", "/etc/passwd", "x/../../y", "~/x", "C:\\x", "a\\b", "walker\0", "walk\n", "walk\x1b[2J", "walk\u202e", "walk\u200b"]
    ),
    st.sampled_from(["WALKER", "Walker/walk", "w\u0430lker", "\uff57alker", "wal\u0138er", "\ufb01nd", "walk\u00b2", "\u0661"]),
    st.text(min_size=1, max_size=40).filter(lambda text: re.search(r"[^a-z0-9._/@:-]", text)),
    st.integers(201, 5000).map(lambda length: "a" * length),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=BAD)
def test_no_name_leads_out_of_the_bank(bank, name):
    before = sorted(bank.root.parent.rglob("*"))
    for use in (
        lambda: bank.put(skill_of(), name),
        lambda: bank.alias("walker/walk", name, 1),
        lambda: bank.alias(name, "best", 1),
        lambda: bank.versions(name),
        lambda: bank.moves(name),
        lambda: bank.get(name),
        lambda: bank.remove(f"walker/walk@{name}"),
    ):
        with pytest.raises(ValueError, match=r"is not a name|is not an alias|has \d+ characters|is not a content prefix|ends in '@'") as caught:
            use()
        assert len(str(caught.value)) < 1000
    assert sorted(bank.root.parent.rglob("*")) == before


@pytest.mark.parametrize("name", ["Walker", "walker/Walk", "w\u0430lker", "a b", "walk\n", "a" * 201, "walker/walk.", "deep/" * 60 + "x"])
def test_folders_that_are_no_names_are_named_and_not_read(bank, name):
    before = [entry.ref for entry in bank.list()]
    shutil.copytree(bank.root / "walker/run", bank.root / name)
    assert [entry.ref for entry in bank.list()] == before == [Ref(name, number) for name, numbers in bank.names() for number in numbers]
    (problem,) = bank.verify()
    assert re.fullmatch(r".*: .* is no name, so that no reference leads to the versions in it: rename the folder", str(problem), re.DOTALL)


def test_folders_without_versions_are_nobodys(bank):
    (bank.root / "Pictures/Old").mkdir(parents=True)
    (bank.root / "Pictures/Old/1.png").touch()
    assert bank.verify() == []


@pytest.mark.parametrize("what", ["root", "name", "version"])
def test_what_is_behind_a_link_is_not_read_or_written(bank, tmp_path, what):
    place, ref = {"root": ("linked", "linked/walk"), "name": ("walker/linked", "walker/linked"), "version": ("walker/walk/3", "walker/walk@3")}[what]
    target = {"root": "walker", "name": "walker/walk", "version": "walker/walk/1"}[what]
    outside = shutil.copytree(bank.root / target, tmp_path / "outside")
    before = [entry.ref for entry in bank.list()]
    (bank.root / place).symlink_to(outside)
    assert [entry.ref for entry in bank.list()] == before
    with pytest.raises(UnknownRef, match=f"{ref.partition('@')[0]}"):
        bank.get(f"{ref.partition('@')[0]}@{3 if what == 'version' else 1}")
    (problem,) = bank.verify()
    assert str(problem).endswith(f"{place.rpartition('/')[2]} is a link: what is behind it is not read")
    if what == "version":
        assert bank.put(skill_of(9), "walker/walk") == Ref("walker/walk", 4)
    else:
        with pytest.raises(ValueError, match=f"'{ref}' lies behind a link in the bank"):
            bank.put(skill_of(9), ref)
        with pytest.raises(ValueError, match=f"'{ref}' lies behind a link in the bank"):
            Bank(bank.root).pull(str(shutil.copytree(bank.root, tmp_path / "other", symlinks=False)), f"{ref}@1")
    assert sorted(path.name for path in (tmp_path / "outside").iterdir()) == sorted(path.name for path in (bank.root / target).iterdir())


@pytest.mark.parametrize("file", ["walker/walk/1/card.json", "walker/walk/aliases.json", "walker/walk/2/tombstone.json"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")), "is no plain file"),
        (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "is no plain file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "is no plain file"),
        (lambda path: (path.unlink(), path.mkdir()), "is no plain file"),
        (lambda path: os.truncate(path, 100 * 2**20), "has 104857600 bytes, more than the 16777216 that are read"),
        (lambda path: os.truncate(path, 2**40), "has 1099511627776 bytes, more than"),
    ],
    ids=["link", "device", "pipe", "folder", "100 MB", "1 TB"],
)
def test_what_should_be_a_small_file_is_none(bank, file, damage, message):
    if "tombstone" in file:
        bank.remove("walker/walk@2", force=True)
    damage(bank.root / file)
    ref = {"card.json": "walker/walk@1", "aliases.json": "walker/walk", "tombstone.json": "walker/walk@2"}[file.rpartition("/")[2]]
    assert any(re.match(f"{ref}: {file.rpartition('/')[2]} {message}", str(problem)) for problem in bank.verify())
    with pytest.raises(ValueError, match=f"{ref}: {file.rpartition('/')[2]} {message}"):
        bank.get("walker/walk@best" if ref == "walker/walk" else ref)
    if file.endswith("card.json"):
        with pytest.raises(ValueError, match=f"{ref}: card.json {message}"):
            bank.list()


TWICE = json.dumps({A: tensor([2, 6], 0, 48), "x": tensor([2, 6], 0, 48), B: tensor([4, 2], 48, 80)}).replace('"x"', f'"{A}"').encode()


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "is damaged or no safetensors file"),
        ({}, b"", "a skill needs at least one module"),
        ({A: tensor([2, 6], 0, 48), B: tensor([4, 2], 16, 48)}, bytes(48), "is damaged or no safetensors file"),
        ({A: tensor([2, 6], 0, 48), B: tensor([4, 2], 48, 80)}, bytes(60), "is damaged or no safetensors file"),
        ({A: tensor([2, 6], 0, 48), B: tensor([4, 2], 48, 80)}, bytes(90), "is damaged or no safetensors file"),
        ({A: tensor([2, 6], 0, 48, "F64"), B: tensor([4, 2], 48, 80)}, bytes(80), "is damaged or no safetensors file"),
        ({A: tensor([2, 6], 0, 48, "F33"), B: tensor([4, 2], 48, 80)}, bytes(80), "is damaged or no safetensors file"),
        ({A: tensor([2**62, 2**62], 0, 48), B: tensor([4, 2], 48, 80)}, bytes(80), "is damaged or no safetensors file"),
        ({A: tensor([-2, -6], 0, 48), B: tensor([4, 2], 48, 80)}, bytes(80), "is damaged or no safetensors file"),
        ({A: tensor([2, 6], 0, 12, "BOOL"), B: tensor([4, 2], 12, 20, "BOOL")}, bytes(20), "must be 16, 32 or 64 bits of floating point"),
        ({A: tensor([2, 6], 0, 12, "F8_E4M3"), B: tensor([4, 2], 12, 20, "F8_E4M3")}, bytes(20), "must be 16, 32 or 64 bits of floating point"),
        ({A: tensor([2, 0, 2**62], 0, 0), B: tensor([0, 2], 0, 0)}, b"", "module 'a' is empty"),
        ({"__metadata__": {"format": 1}}, b"", "is damaged or no safetensors file"),
        (TWICE, bytes(80), "has a name in its header twice"),
        (b'{"a":' * 10_000, b"", "is damaged or no safetensors file"),
    ],
)
def test_headers_that_lie_are_refused(bank, header, data, message):
    forge(bank, "walker/walk@1", {"adapter_model.safetensors": safetensors(header, data), "adapter_config.json": CONFIG})
    refused(bank, "walker/walk@1", f"walker/walk@1: .*{message}")


@pytest.mark.parametrize("length", [2**63, 2**40, 10**8 + 1, 500])
def test_headers_that_are_longer_than_their_file_are_refused(bank, length):
    forge(bank, "walker/walk@1", {"adapter_model.safetensors": struct.pack("<Q", length) + b"{}"})
    refused(bank, "walker/walk@1", "walker/walk@1: .*is damaged or no safetensors file")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("time_stamps", ["just changed", "long ago"])
def test_factors_that_are_not_finite_are_refused_every_time(bank, monkeypatch, value, time_stamps):
    if time_stamps == "long ago":
        monkeypatch.setattr(indexing, "_SETTLED", 0)
    bank.get("walker/walk@1")
    factors = torch.ones(20)
    factors[7] = value
    header = {A: tensor([2, 6], 0, 48), B: tensor([4, 2], 48, 80)}
    forge(bank, "walker/walk@1", {"adapter_model.safetensors": safetensors(header, factors.numpy().tobytes()), "adapter_config.json": CONFIG})
    for _ in range(3):
        refused(bank, "walker/walk@1", "walker/walk@1: .*factor 'a' holds NaN or infinite entries")


LINK = {"ref": "walker/stand@1", "hash": "ab", "name": None, "fingerprint": None}


@pytest.mark.parametrize(
    ("ref", "files", "fields", "message"),
    [
        ("walker/walk@1", {"adapter_model.bin": b"\x80\x04."}, {}, r"names the files \['README.md', .*'adapter_model.bin'.* not those of a skill"),
        ("walker/walk@1", {"adapter_model.bin": b"\x80\x04.", "adapter_model.safetensors": None}, {}, "names the files .* not those of a skill"),
        ("walker/stand@1", {"model.pkl": b"\x80\x04."}, {}, r"names the files .*'model.pkl'"),
        ("walker/walk@1", {"setup.py": b""}, {}, "names the files .*'setup.py'"),
        ("walker/walk@1", {}, {"files": {}}, r"names the files \[\]"),
        ("walker/walk@1", {}, {"kind": "base"}, "names the files .*, which are not those of a base"),
        ("walker/walk@1", {}, {"kind": ["skill"]}, r"has a value of the wrong type in \['kind'\]"),
        ("walker/walk@1", {}, {"hash": "ab" * 32}, "has a content hash that its own files do not give"),
        ("walker/walk@1", {}, {"base": {**LINK, "ref": "../../x@1"}}, "has a base that is no ref, hash, name and fingerprint"),
        ("walker/walk@1", {}, {"base": {**LINK, "ref": "walker/stand"}}, "has a base that is no ref"),
        ("walker/walk@1", {}, {"base": {**LINK, "ref": 1}}, "has a base that is no ref"),
        ("walker/walk@1", {}, {"base": LINK}, "names the base 'walker/stand@1' with content ab, but the bank has"),
        ("walker/walk@1", {}, {"parents": [{"ref": "walker/run@best", "hash": "ab", "weight": None}]}, "has a parent that is no ref"),
        ("walker/walk@1", {}, {"parents": {"ref": "walker/run@1"}}, r"has a value of the wrong type in \['parents'\]"),
        ("walker/walk@1", {}, {"parents": [{"ref": "walker/run@1", "hash": "ab", "weight": "1"}]}, "has a parent that is no ref"),
        ("walker/walk@1", {}, {"tags": [1]}, "has a tag or a tool's version that is no text"),
        ("walker/walk@1", {}, {"notes": {}}, r"has a value of the wrong type in \['notes'\]"),
        ("walker/stand@1", {"model.json": b"[]"}, {}, "model.json is no JSON object"),
        ("walker/stand@1", {"model.json": b"[" * 100_000}, {}, "model.json is no JSON"),
        ("walker/stand@1", {"model.json": b'{"_target_": 1}'}, {}, "needs the '_target_' that builds it"),
        ("walker/stand@1", {"model.json": b'{"_target_": "x", "_target_": "y"}'}, {}, r"model.json is no JSON \(a key is there twice\)"),
        ("walker/stand@1", {"model.json": b'{"_target_": "x", "y": NaN}'}, {}, r"model.json is no JSON \(NaN is no finite number\)"),
        ("walker/stand@1", {"model.json": b'{"_target_": "x", "y": 1e999}'}, {}, r"model.json is no JSON \(1e999 is no finite number\)"),
        ("walker/both@1", {"composition.json": b"[]"}, {}, "composition.json is no JSON object"),
        ("walker/both@1", {"composition.json": b"{}"}, {}, "composition.json is no base and skills by reference and hash"),
        ("walker/both@1", {}, {"parents": []}, "composition.json names .*, but the card"),
        ("walker/both@1", {}, {"base": None}, "composition.json names .*, but the card"),
    ],
)
def test_sealed_cards_and_files_that_lie_are_refused(bank, ref, files, fields, message):
    forge(bank, ref, files, **fields)
    refused(bank, ref, f"{ref}: .*{message}")


def test_a_composition_that_names_other_skills_than_its_card_is_refused(bank):
    body = json.loads((bank.path("walker/both") / "composition.json").read_bytes())
    for changed in ({"skills": body["skills"][::-1]}, {"base": {**body["base"], "hash": "ab"}}, {"merge": []}, {"extra": 1}):
        forge(bank, "walker/both@1", {"composition.json": json.dumps({**body, **changed}).encode()})
        refused(bank, "walker/both@1", "walker/both@1: .*composition.json (names|is no base and skills)")
    forge(bank, "walker/both@1", {"composition.json": json.dumps({**body, "merge": {"weights": ["a", "b"]}}).encode()})
    refused(bank, "walker/both@1", r"walker/both@1: .*weights=\['a', 'b'\] are no numbers")


@pytest.mark.parametrize("way", [["walker/walk@1"], ["walker/walk@1", "walker/run@1"], ["walker/walk@1", "walker/run@1", "walker/walk@2"]])
def test_versions_that_stand_on_themselves_are_named(bank, tmp_path, way):
    for ref, parent in zip(way, [*way[1:], way[0]], strict=True):
        forge(bank, ref, parents=[{"ref": parent, "hash": bank.card(parent).hash, "weight": None}])
    assert any("stands on itself (" in str(problem) for problem in bank.verify())
    for use in (
        lambda: bank.lineage(way[0]),
        lambda: bank.push(str(tmp_path / "there")),
        lambda: Bank(tmp_path / "new").pull(str(bank.root), way[0]),
    ):
        with pytest.raises(ValueError, match=r"stands on itself \(.*\): one of their cards is forged, take it away"):
            use()


def resealed(text):
    """Text with the digits of its seal, which is written SEAL."""
    return text.replace("SEAL", hashlib.sha256(text.replace("SEAL", "0" * 64).encode()).hexdigest()).encode()


@pytest.mark.parametrize(
    "text",
    [
        '{"x": {\n  "seal": "SEAL"\n}}',
        '[{\n  "seal": "SEAL"\n}]',
        '{"format": 1, "format": 2,\n  "seal": "SEAL"\n}',
        '{"format": NaN,\n  "seal": "SEAL"\n}',
        '{"format": 1e400,\n  "seal": "SEAL"\n}',
        '{"format": ' + "[" * 100_000 + ',\n  "seal": "SEAL"\n}',
        '{"format": \ud800,\n  "seal": "SEAL"\n}'.encode("utf-8", "surrogatepass").decode("latin-1"),
    ],
)
def test_sealed_texts_that_skillbank_does_not_write_are_refused(text):
    with pytest.raises(ValueError, match="is sealed but no JSON that skillbank writes"):
        unseal(resealed(text))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_card_with_anything_in_a_field_is_read_or_refused(shipped, data):  # noqa: F811
    body = unseal((shipped.root / "walker/walk/1/card.json").read_bytes())
    field = data.draw(st.sampled_from(sorted(body)))
    value = data.draw(VALUES)
    if isinstance(body[field], dict) and body[field] and data.draw(st.booleans()):
        value = {**body[field], data.draw(st.sampled_from(sorted(body[field]))): value}
    try:
        card = Card.from_bytes(seal({**body, field: value}))
    except ValueError:
        return
    assert Card.from_bytes(card.to_bytes()) == card
    assert all(str(Ref.parse(ref)) == ref for ref in card.stands_on)


@pytest.mark.parametrize("body", [{"format": 2}, {"format": 1, "kind": "skill"}, {"format": 1, "kind": "", "hash": "", "reason": 1, "when": ""}])
def test_tombstones_that_are_none_are_refused(bank, body):
    bank.remove("walker/walk@2", force=True)
    (bank.root / "walker/walk/2/tombstone.json").write_bytes(seal(body))
    refused(bank, "walker/walk@2", r"walker/walk@2: tombstone.json has format \d and the fields")
