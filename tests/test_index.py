"""The index of a bank: whatever happens to the bank or to the index, a listing says what lies in the folders."""

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skillbank.bank import Bank, Ref
from skillbank.bank import index as indexing
from skillbank.bank import verify as checking
from skillbank.bank.card import Card
from tests.test_bank import base_of, shipped, skill_of  # noqa: F401


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SKILLBANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/index"


@pytest.fixture
def bank(shipped, tmp_path, cache):  # noqa: F811
    return Bank(shutil.copytree(shipped.root, tmp_path / "bank"))


@pytest.fixture(params=["just changed", "long ago"])
def time_stamps(request, monkeypatch):
    if request.param == "long ago":  # folders are believed at once, as they are two seconds later
        monkeypatch.setattr(indexing, "_SETTLED", 0)


def plain(bank):
    """A listing without the index."""
    return [(Ref(name, number), bank.place.card(Ref(name, number))) for name, numbers in bank.names() for number in numbers]


def listed(bank):
    return [(entry.ref, entry.data) for entry in bank.list()]


def test_a_listing_follows_the_bank(bank, time_stamps, tmp_path):
    assert listed(bank) == plain(bank)
    for change in (
        lambda: bank.put(skill_of(9), "walker/walk"),
        lambda: bank.put(skill_of(9), "new/deep/name"),
        lambda: bank.remove("walker/gated"),
        lambda: bank.remove("walker/walk@1", force=True),
        lambda: bank.alias("walker/walk", "best", 2),
        lambda: shutil.rmtree(bank.root / "walker/both"),
        lambda: shutil.rmtree(bank.root / "new"),
        lambda: shutil.copytree(bank.root / "walker/run", bank.root / "walker/hop"),
        lambda: (bank.root / "walker/hop").rename(bank.root / "hop"),
        lambda: shutil.rmtree(bank.root / "walker/walk/2"),
        lambda: shutil.copytree(bank.root / "walker/run/1", bank.root / "walker/walk/2"),
        lambda: bank.put(base_of(3), "walker/stand"),
    ):
        change()
        assert listed(bank) == plain(bank)
    other = Bank(tmp_path / "other")
    other.put(skill_of(9), "swim")
    shutil.rmtree(bank.root)
    other.root.rename(bank.root)
    assert [str(ref) for ref, _ in listed(bank)] == ["swim@1"]


def test_what_is_known_is_not_read_again(bank, monkeypatch):
    monkeypatch.setattr(indexing, "_SETTLED", 0)
    before = listed(bank)
    monkeypatch.setattr(indexing, "scan", lambda folder: pytest.fail(f"looked into {folder}"))
    monkeypatch.setattr(indexing, "_read", lambda path: pytest.fail(f"read {path}"))
    assert listed(bank) == before
    assert bank.list(text="WALKS.", where=["metrics.return.mean > 500"])[0].ref == Ref("walker/walk", 1)


def test_a_card_is_parsed_when_it_is_looked_at(bank, monkeypatch):
    entry = bank.list("skill", "walker/run")[0]
    assert "card" not in vars(entry)
    assert isinstance(entry.card, Card)
    assert entry.card is entry.card


def test_a_version_that_arrives_is_listed_when_its_card_is_there(bank, time_stamps):
    folder = bank.root / "arriving/1"
    shutil.copytree(bank.root / "walker/run/1", folder)
    card = (folder / "card.json").read_bytes()
    (folder / "card.json").unlink()
    (folder / ".partial").touch()
    assert listed(bank) == plain(bank)
    (folder / "card.json").write_bytes(card)
    assert Ref("arriving", 1) in dict(listed(bank))


def test_a_damaged_card_is_named_until_it_is_mended(bank, time_stamps):
    path = bank.root / "walker/run/1/card.json"
    card = path.read_bytes()
    path.write_bytes(card[:-20])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"walker/run@1: card.json does not match its seal"):
            bank.list()
        assert len(bank.list(pattern="walker/walk")) == 2
    path.write_bytes(card)
    assert listed(bank) == plain(bank)


@pytest.mark.parametrize("damage", ["changed", "gone", "no plain file"])
def test_a_card_that_is_damaged_after_it_was_listed_is_named_where_it_is_looked_at(bank, monkeypatch, damage):
    monkeypatch.setattr(indexing, "_SETTLED", 0)
    bank.list()
    path = bank.root / "walker/run/1/card.json"
    card = path.read_bytes()
    path.unlink()
    if damage == "changed":
        path.write_bytes(card.replace(b"skill", b"skilL", 1))
    elif damage == "no plain file":
        path.mkdir()
    what = {"changed": "does not match its seal", "gone": "is missing", "no plain file": "is no plain file"}[damage]
    for conditions in ((), ("kind = skill",)):
        for entry in bank.list("skill", where=conditions):
            if entry.name != "walker/run":
                assert entry.card.kind == "skill"
                continue
            with pytest.raises(ValueError, match=rf"walker/run@1: card.json {what}.*; `skillbank rm walker/run@1 --force` takes it away"):
                entry.card  # noqa: B018
    with pytest.raises(ValueError, match=r"walker/run@1: card.json"):
        bank.dependents("walker/walk@2")


@pytest.mark.parametrize("damage", ["gone", "noise", "cut", "another format", "no database"])
def test_an_index_that_cannot_be_read_is_made_anew(bank, cache, damage):
    before = listed(bank)
    (path,) = cache.glob("*.sqlite")
    for rest in cache.glob("*.sqlite-*"):
        rest.unlink()
    data = path.read_bytes()
    if damage == "another format":
        with sqlite3.connect(path) as file:
            file.execute("PRAGMA user_version = 99")
        file.close()
    else:
        path.unlink()
        if damage != "gone":
            path.write_bytes({"noise": data[:100] + os.urandom(len(data) - 100), "cut": data[: len(data) // 2], "no database": b"text" * 500}[damage])
    assert listed(bank) == before
    assert listed(bank) == before


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(min_value=0, max_value=10**9), bit=st.integers(min_value=0, max_value=7))
def test_no_flipped_bit_of_the_index_makes_a_listing_lie(bank, cache, place, bit):
    before = plain(bank)
    listed(bank)
    (path,) = cache.glob("*.sqlite")
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)
    assert listed(bank) == before
    bank.alias("walker/walk", "x", 1)
    assert listed(bank) == before


def test_damage_in_the_names_of_tables_is_seen(bank, cache):
    before = plain(bank)
    listed(bank)
    (path,) = cache.glob("*.sqlite")
    data = path.read_bytes()
    start = data.index(b"CREATE TABLE")
    for place in range(start, start + 60):
        damaged = bytearray(data)
        damaged[place] ^= 128  # no UTF-8 any more, and SQLite quotes it in its error
        path.write_bytes(damaged)
        assert listed(bank) == before


def test_without_a_place_for_it_there_is_an_index_all_the_same(bank, monkeypatch):
    monkeypatch.setenv("SKILLBANK_CACHE", "/proc/nowhere")
    assert listed(bank) == plain(bank)
    assert bank.put(skill_of(1), "walker/walk", card={"base": "walker/stand"}) == Ref("walker/walk", 1)


def test_indexes_that_nobody_asks_for_are_swept(bank, cache, tmp_path):
    listed(bank)
    (path,) = cache.glob("*.sqlite")
    os.utime(path, (0, 0))
    other = Bank(tmp_path / "other")
    other.put(skill_of(1), "walk")
    assert not path.exists()
    assert listed(bank) == plain(bank)


def test_the_cache_is_in_the_users_folder(monkeypatch):
    monkeypatch.delenv("SKILLBANK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert indexing.cache_folder() == Path("/somewhere/skillbank")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert indexing.cache_folder() == Path.home() / ".cache/skillbank"


@pytest.fixture
def hashed(bank, monkeypatch):
    """The files whose digests are computed."""
    digest, computed = checking.file_digest, []
    monkeypatch.setattr(checking, "file_digest", lambda path: computed.append(path.name) or digest(path))
    return computed


@pytest.mark.parametrize("process", ["the same", "another"])
def test_a_version_is_hashed_once(bank, hashed, monkeypatch, process):
    def get():
        if process == "another":
            monkeypatch.setattr(indexing, "_TRUSTED", {})
        return bank.get("walker/walk@1")

    monkeypatch.setattr(indexing, "_SETTLED", 0)
    get()
    assert sorted(hashed) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    get()
    assert len(hashed) == 3
    bank.verify("walker/walk@1")
    assert len(hashed) == 6, "verify reads every byte, whatever is known"
    path = bank.path("walker/walk@1") / "adapter_model.safetensors"
    data = path.read_bytes()
    stamp = path.stat()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # the time of the last change of the inode still tells
    with pytest.raises(ValueError, match=r"walker/walk@1: adapter_model.safetensors does not match the hash in its card"):
        get()
    path.write_bytes(data)
    assert get().fingerprint == skill_of(1).fingerprint


def test_a_version_that_changes_while_it_is_read_is_not_believed(bank, monkeypatch):
    monkeypatch.setattr(indexing, "_SETTLED", 0)
    ref = bank.resolve("walker/walk@1")
    path = bank.path(ref) / "adapter_model.safetensors"
    assert not bank.place.trusted(ref)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    bank.place.trust(ref)
    assert not bank.place.trusted(ref)
    with pytest.raises(ValueError, match=r"walker/walk@1: adapter_model.safetensors does not match the hash in its card"):
        bank.get(ref)


def test_what_is_removed_while_it_is_listed_is_gone(bank, monkeypatch, time_stamps):
    read = indexing._read
    monkeypatch.setattr(indexing, "_read", lambda path: (shutil.rmtree(path.parent), path.parent.mkdir(), read(path))[2])
    assert listed(bank) == []
    monkeypatch.undo()
    assert listed(bank) == plain(bank) == []


def test_time_stamps_that_come_again_do_not_hide_a_version(bank, monkeypatch):
    monkeypatch.setattr(indexing, "_SETTLED", 0)
    listed(bank)
    folder = bank.root / "walker/walk"
    stamp = folder.stat()
    bank.put(skill_of(9), "walker/walk")
    os.utime(folder, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert listed(bank) == plain(bank)
    assert bank.list(pattern="walker/walk")[-1].ref == Ref("walker/walk", 3)


def test_a_version_that_was_just_written_is_not_believed(bank, hashed):
    bank.get("walker/walk@1")
    bank.get("walker/walk@1")
    assert len(hashed) == 6


def test_many_processes_list_and_put_at_once(bank):
    code = (
        "import sys; from tests.test_bank import skill_of; from skillbank.bank import Bank; bank = Bank(sys.argv[1]); "
        "[(bank.put(skill_of(100 * int(sys.argv[2]) + n), 'crowd'), bank.list()) for n in range(5)]"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(bank.root), str(which)]) for which in range(3)]
    assert [process.wait() for process in started] == [0] * 3
    assert bank.versions("crowd") == list(range(1, 16))
    assert listed(bank) == plain(bank)
    assert bank.verify() == []
