"""Aliases that move, versions that are taken away, and what interrupted processes leave behind."""

import errno
import os
import resource
import shutil
import threading

import pytest
import torch

from skillbank.bank import Bank, Ref, UnknownRef
from skillbank.bank.publish import temporary
from skillbank.bank.sealed import seal, unseal
from skillbank.tensors import save_tensors
from tests.test_bank import shipped, skill_of  # noqa: F401


@pytest.fixture
def bank(shipped, tmp_path):  # noqa: F811
    return Bank(shutil.copytree(shipped.root, tmp_path / "bank"))


def test_every_move_of_an_alias_is_kept(bank):
    bank.alias("walker/walk", "best", 2)
    bank.alias("walker/walk", "best", 2)
    bank.alias("walker/walk", "first", 1, protect=True)
    assert bank.alias("walker/walk", "best", None) is None
    assert [(move.alias, move.version, move.protected) for move in bank.moves("walker/walk")] == [
        ("best", 1, False),
        ("best", 2, False),
        ("first", 1, True),
        ("best", None, False),
    ]
    assert all(move.when for move in bank.moves("walker/walk"))
    assert bank.aliases("walker/walk") == {"first": 1}
    with pytest.raises(UnknownRef, match="'walker/walk' has no alias 'best'"):
        bank.resolve("walker/walk@best")


@pytest.mark.parametrize(
    ("alias", "expect", "message"),
    [
        ("best", 2, "alias 'best' of 'walker/walk' points at version 1, not at version 2 as expected: somebody moved it"),
        ("best", None, "points at version 1, not at nothing as expected"),
        ("new", 1, "alias 'new' of 'walker/walk' points at nothing, not at version 1 as expected"),
    ],
)
def test_an_alias_that_points_elsewhere_than_expected_stays(bank, alias, expect, message):
    before = bank.aliases("walker/walk")
    with pytest.raises(ValueError, match=message):
        bank.alias("walker/walk", alias, 2, expect=expect)
    assert bank.aliases("walker/walk") == before


def test_of_many_who_compare_and_set_one_wins(bank):
    won = []

    def compete(number):
        try:
            bank.alias("walker/walk", "mine", 1 + number % 2, expect=None)
            won.append(number)
        except ValueError:
            pass

    threads = [threading.Thread(target=compete, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert bank.aliases("walker/walk")["mine"] == 1 + won[0] % 2


def test_a_protected_alias_moves_only_when_unprotected(bank):
    bank.alias("walker/walk", "best", 1, protect=True)
    for version in (2, None):
        with pytest.raises(ValueError, match="alias 'best' of 'walker/walk' is protected at version 1: unprotect it in the same call"):
            bank.alias("walker/walk", "best", version)
    assert bank.alias("walker/walk", "best", 2, protect=False) == Ref("walker/walk", 2)
    bank.alias("walker/walk", "best", 1)
    assert bank.aliases("walker/walk")["best"] == 1


def test_aliases_of_the_first_format_are_read_and_kept(bank):
    path = bank.root / "walker/walk/aliases.json"
    path.write_bytes(seal({"format": 1, "aliases": {"old": 1}}))
    assert bank.aliases("walker/walk") == {"old": 1}
    bank.alias("walker/walk", "best", 2)
    assert bank.aliases("walker/walk") == {"best": 2, "old": 1}
    assert unseal(path.read_bytes())["format"] == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"format": 3, "moves": []}, "has format 3, this skillbank reads up to 2"),
        ({"format": 2, "moves": {}}, "has format 2, this skillbank reads up to 2"),
        ({"format": 2, "moves": [{"alias": "a"}]}, "has the move {'alias': 'a'}, which is none of an alias to a version"),
        ({"format": 2, "moves": [["best", 1]]}, r"has the move \['best', 1\]"),
        ({"format": 2, "moves": [{"alias": "../a", "version": 1, "protected": False, "when": ""}]}, r"has the move {'alias': '../a'"),
        (
            {"format": 2, "moves": [{"alias": "a", "version": -1, "protected": False, "when": ""}]},
            "has the move .*'version': -1",
        ),
        ({"format": 1, "aliases": {"a": "1"}}, r"has the move {'alias': 'a', 'version': '1'"),
        ({"format": 1, "aliases": {"a\x1b[2J": 1}}, r"has the move {'alias': 'a\\x1b\[2J'"),
    ],
)
def test_aliases_that_are_none_are_refused(bank, body, message):
    (bank.root / "walker/walk/aliases.json").write_bytes(seal(body))
    with pytest.raises(ValueError, match=f"walker/walk: aliases.json {message}"):
        bank.aliases("walker/walk")


def test_dependents(bank):
    assert [str(ref) for ref in bank.dependents("walker/walk@1")] == ["walker/both@1"]
    assert [str(ref) for ref in bank.dependents("walker/walk@2")] == ["walker/gated@1", "walker/run@1"]
    assert len(bank.dependents("walker/stand")) == 5
    assert bank.dependents("walker/both") == []


def test_what_is_removed_while_it_is_listed_depends_on_nothing(bank, monkeypatch):
    listed = Bank.list

    def then_removed(self, *args, **options):
        found = listed(self, *args, **options)
        monkeypatch.undo()
        self.remove("walker/gated@1")
        return found

    monkeypatch.setattr(Bank, "list", then_removed)
    assert [str(ref) for ref in bank.dependents("walker/walk@2")] == ["walker/run@1"]


def test_what_is_needed_is_not_removed(bank):
    with pytest.raises(ValueError, match="walker/walk@2 is needed by walker/gated@1, walker/run@1: remove these first, or force it"):
        bank.remove("walker/walk@2")
    bank.remove("walker/both")
    with pytest.raises(ValueError, match="walker/walk@1 is needed by alias 'best'"):
        bank.remove("walker/walk@1")
    assert bank.verify() == []


def test_a_removed_version_is_gone_and_its_number_is_never_used_again(bank):
    assert bank.remove("walker/walk@2", force=True, reason="it limps") == Ref("walker/walk", 2)
    assert bank.versions("walker/walk") == [1]
    assert bank.resolve("walker/walk") == Ref("walker/walk", 1)
    assert [path.name for path in (bank.root / "walker/walk/2").iterdir()] == ["tombstone.json"]
    for lookup in (bank.get, bank.card, bank.path):
        with pytest.raises(UnknownRef, match=r"walker/walk@2 was removed 20.*: it limps"):
            lookup("walker/walk@2")
    assert {problem.ref for problem in bank.verify()} == {"walker/gated@1", "walker/run@1"}
    assert bank.put(skill_of(2), "walker/walk", card={"base": "walker/stand"}) == Ref("walker/walk", 3)


def test_the_newest_number_is_not_reused_either(bank):
    bank.remove("walker/both", reason="it limps")
    assert bank.versions("walker/both") == []
    gone = "no 'walker/both' in .*: walker/both@1"
    for ref, said in (("walker/both", gone), ("walker/both@1", "^walker/both@1"), ("walker/both@best", gone)):
        with pytest.raises(UnknownRef, match=rf"{said} was removed 20.*: it limps"):
            bank.resolve(ref)
    assert bank.put(skill_of(5), "walker/both", card={"base": "walker/stand"}) == Ref("walker/both", 2)


def test_a_changed_tombstone_is_named(bank):
    bank.remove("walker/both")
    path = bank.root / "walker/both/1/tombstone.json"
    path.write_bytes(path.read_bytes().replace(b"composition", b"compositiom"))
    assert [str(problem) for problem in bank.verify()] == [
        "walker/both@1: tombstone.json does not match its seal: it was changed after it was written; restore it from a copy"
    ]


def test_gc_finishes_an_interrupted_removal(bank, tmp_path):
    shutil.copytree(bank.root / "walker/both/1", tmp_path / "copy")
    bank.remove("walker/both")
    shutil.copytree(tmp_path / "copy", bank.root / "walker/both/1", dirs_exist_ok=True)
    assert bank.versions("walker/both") == []
    swept = bank.gc()
    assert {path.name for path in swept} == {"README.md", "card.json", "composition.json"}
    assert bank.gc() == []
    assert [path.name for path in (bank.root / "walker/both/1").iterdir()] == ["tombstone.json"]


def test_gc_leaves_a_writer_at_work_alone(bank):
    (bank.root / "walker/walk/.aliases-0").touch()
    with temporary(bank.root) as folder:
        assert bank.gc() == [bank.root / "walker/walk/.aliases-0"]
        assert folder.is_dir()
    assert not folder.exists()
    assert bank.gc() == []


@pytest.mark.parametrize("number", [errno.EEXIST, errno.ENOTEMPTY, errno.ESTALE, errno.ENOENT])
@pytest.mark.parametrize("operation", ["put", "alias", "remove", "pull"])
def test_a_rename_that_worked_and_reports_a_failure_is_none(bank, tmp_path, monkeypatch, operation, number):
    other = Bank(tmp_path / "other")
    real, failed = os.replace, []

    def late(source, target):
        real(source, target)
        if not failed and not str(target).endswith(".safetensors"):
            failed.append(target)
            raise OSError(number, "the answer came late")

    monkeypatch.setattr(os, "replace", late)
    run, done = {
        "put": (lambda: bank.put(skill_of(9), "walker/walk"), lambda: bank.versions("walker/walk") == [1, 2, 3]),
        "alias": (lambda: bank.alias("walker/walk", "best", 2), lambda: bank.aliases("walker/walk") == {"best": 2}),
        "remove": (lambda: bank.remove("walker/both"), lambda: bank.versions("walker/both") == []),
        "pull": (lambda: other.pull(str(bank.root), "walker/walk@1"), lambda: other.versions("walker/walk") == [1]),
    }[operation]
    run()
    assert done()
    assert failed
    assert bank.verify() == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_left_is_named(bank, monkeypatch, number):
    def refuse(path):
        raise OSError(number, os.strerror(number), str(path))

    before = sorted(bank.root.rglob("*"))
    monkeypatch.setattr("skillbank.bank.publish.fsync", refuse)
    with pytest.raises(OSError, match=r"no space left for the bank '.*bank'; nothing half was stored: make room and try again") as caught:
        bank.put(skill_of(9), "walker/walk")
    assert caught.value.errno == number
    assert sorted(bank.root.rglob("*")) == before


def test_tensors_that_do_not_fit_leave_no_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot be written: .*File too large") as caught:
            save_tensors(tmp_path / "x.safetensors", {"x": torch.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_what_is_removed_while_it_is_read_was_removed(bank, monkeypatch):
    asked = bank.place.trusted
    monkeypatch.setattr(bank.place, "trusted", lambda ref: (bank.remove("walker/both"), asked(ref))[1])
    with pytest.raises(UnknownRef, match=r"walker/both@1 was removed 20"):
        bank.get("walker/both")


@pytest.mark.parametrize("where", ["folder", "elsewhere"])
def test_what_is_removed_while_it_is_verified_is_no_problem(bank, where):
    there = bank if where == "folder" else Bank(f"file://{bank.root}")
    assert there.verify(done=lambda so_far, _: so_far or bank.remove("walker/both"), workers=1) == []
    (bank.path("walker/gated") / "gate.safetensors").write_bytes(b"")
    problems = there.verify(done=lambda so_far, _: so_far or bank.remove("walker/run", force=True), workers=1)
    assert {problem.ref for problem in problems} == {"walker/gated@1"}


def test_what_was_removed_while_it_is_put_gets_a_new_number(bank, monkeypatch):
    known = bank.place.with_content(bank.card("walker/both").hash)
    both = bank.get("walker/both")
    bank.remove("walker/both")
    monkeypatch.setattr(bank.place, "with_content", lambda *_: known)
    assert bank.put(both, "walker/both") == Ref("walker/both", 2)


def test_gc_says_what_it_cannot_sweep(bank, monkeypatch):
    (bank.root / ".tmp-x").mkdir()

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "rmdir", refuse)
    with pytest.raises(PermissionError, match=r"is not writable: Permission denied"):
        bank.gc()
    monkeypatch.undo()
    assert bank.gc() == [bank.root / ".tmp-x"]
