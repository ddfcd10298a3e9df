"""Push and pull: what arrives is byte-identical and verified, what is there stays, what differs is an error, what breaks goes on."""

import logging
import os
import shutil
import sys
import uuid
from contextlib import suppress

import fsspec
import pytest

from skillbank import cli
from skillbank.bank import Bank, Ref, UnknownRef
from skillbank.bank import index as indexing
from skillbank.bank import publish as publishing
from skillbank.bank.remote import Remote
from skillbank.bank.transfer import _files
from tests.test_bank import shipped, skill_of  # noqa: F401


@pytest.fixture
def bank(shipped, tmp_path):  # noqa: F811
    return Bank(shutil.copytree(shipped.root, tmp_path / "bank"))


@pytest.fixture(scope="module")
def s3():
    """A real S3 server in this process."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("banks")
        yield "s3://banks"
    server.stop()


@pytest.fixture(params=["memory", "folder", "file", "s3", "hf", "hf-folder"])
def url(request, tmp_path):
    name = uuid.uuid4().hex
    if request.param in ("s3", "hf", "hf-folder"):
        where = {"s3": "s3", "hf": "hub", "hf-folder": "hub"}[request.param]
        place = request.getfixturevalue(where)
        yield {"s3": f"{place}/{name}", "hf": f"hf://user/{name}", "hf-folder": f"hf://datasets/user/{name}/some/bank"}[request.param]
        return
    yield {"memory": f"memory://{name}/bank", "folder": str(tmp_path / "remote"), "file": f"file://{tmp_path}/other"}[request.param]
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()


def contents(bank):
    return {path.relative_to(bank.root).as_posix(): path.read_bytes() for path in bank.root.rglob("*") if path.is_file() and path.name[0] != "."}


def test_pushed_and_pulled_elsewhere_is_byte_identical(bank, url, tmp_path):
    sent = bank.push(url)
    assert sent == [entry.ref for entry in sorted(bank.list(), key=lambda entry: sent.index(entry.ref))]
    assert bank.push(url) == []
    other = Bank(tmp_path / "other-bank")
    told = []
    assert set(other.pull(url, done=lambda so_far, of: told.append((so_far, of)))) == set(sent)
    assert told == [(count, 6) for count in range(7)]
    assert contents(other) == contents(bank)
    assert other.verify() == []
    assert other.pull(url) == []


def test_what_a_version_stands_on_comes_first(bank, url):
    assert [str(ref) for ref in bank.push(url, "walker/both")] == [
        "walker/stand@1", "walker/walk@1", "walker/walk@2", "walker/run@1", "walker/both@1",
    ]  # fmt: skip
    assert [name for name, _ in Remote(url).names()] == ["walker/both", "walker/run", "walker/stand", "walker/walk"]


def test_what_an_alias_points_at_travels_with_it(bank, url, tmp_path):
    other = Bank(tmp_path / "other-bank")
    skill = bank.put(skill_of(7), "alone")
    bank.put(skill_of(8), "alone")
    bank.alias("alone", "best", 1)
    assert [str(ref) for ref in bank.push(url, "alone@2")] == ["alone@2", str(skill)]
    assert other.pull(url, "alone@2")[1:] == [skill]
    assert other.verify() == []


def test_one_version_by_alias(bank, url, tmp_path):
    bank.push(url)
    other = Bank(tmp_path / "other-bank")
    assert [str(ref) for ref in other.pull(url, "walker/walk@best")] == ["walker/stand@1", "walker/walk@1"]
    assert other.aliases("walker/walk") == {"best": 1}
    assert [str(ref) for ref in other.pull(url, "walker/walk")] == ["walker/walk@2"]


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("walker/wlak", r"no 'walker/wlak' in Bank.*: did you mean 'walker/walk'\?"),
        ("walker/walk@7", "'walker/walk' has no version 7 in Bank.*: there is 1, 2"),
        ("walker/walk@bset", r"'walker/walk' has no alias 'bset' in Bank.*: did you mean 'best'\?"),
    ],
)
def test_what_is_not_there(bank, url, tmp_path, ref, message):
    bank.push(url)
    with pytest.raises(UnknownRef, match=message):
        Bank(tmp_path / "other-bank").pull(url, ref)


def test_the_same_number_of_another_version_is_a_conflict(bank, url, tmp_path):
    bank.push(url)
    other = Bank(tmp_path / "other-bank")
    other.put(skill_of(8), "walker/walk")
    before = contents(other)
    for transfer in (other.push, other.pull):
        with pytest.raises(ValueError, match="walker/walk@1 is another version here than there: put one of them under another name"):
            transfer(url)
    assert {path: data for path, data in contents(other).items() if path in before} == before


@pytest.fixture
def other(bank, url, tmp_path):
    """Another bank, which has what the first one pushed."""
    bank.push(url)
    other = Bank(tmp_path / "other-bank")
    other.pull(url)
    return other


def test_aliases_go_on_from_each_other_or_conflict(bank, other, url):
    other.alias("walker/walk", "best", 2)
    other.push(url)
    bank.pull(url)
    assert bank.aliases("walker/walk") == {"best": 2}
    bank.alias("walker/walk", "best", 1)
    for version in (None, 2):
        other.alias("walker/walk", "best", version)
    bank.push(url)
    before = contents(other)
    for transfer in (other.push, other.pull):
        with pytest.raises(ValueError, match="alias 'best' of 'walker/walk' points at version 2 here and at version 1 there, and both were moved"):
            transfer(url)
    assert contents(other) == before


def test_independent_moves_of_aliases_join(bank, other, url):
    bank.alias("walker/walk", "first", 1)
    bank.push(url)
    other.alias("walker/walk", "second", 2, protect=True)
    other.push(url)
    other.alias("walker/walk", "second", 1, protect=False)
    other.push(url)
    for each in (bank, other):
        each.pull(url)
        assert each.aliases("walker/walk") == {"best": 1, "first": 1, "second": 1}
        assert [move.alias for move in each.moves("walker/walk")] == ["best", "first", "second", "second"]
    assert bank.push(url) == []


def test_the_protection_of_an_alias_is_not_lost(bank, other, url):
    other.alias("walker/walk", "best", 1, protect=True)
    other.push(url)
    for version in (1, None):
        bank.alias("walker/walk", "tmp", version)
    bank.push(url)
    bank.pull(url)
    assert [(move.alias, move.protected) for move in bank.moves("walker/walk")][1:] == [("best", True), ("tmp", False), ("tmp", False)]
    for version in (2, 1):
        bank.alias("walker/walk", "best", version, protect=False)
    other.alias("walker/walk", "best", 2, protect=False)
    other.alias("walker/walk", "best", 1, protect=True)
    other.push(url)
    with pytest.raises(ValueError, match="points at version 1 here and at version 1, protected, there, and both were moved"):
        bank.push(url)


def during(number, action):
    """Call back a transfer once, before the version of this number goes."""
    waiting = [action]
    return lambda so_far, _: waiting.pop()() if so_far == number and waiting else None


def test_what_appears_meanwhile_is_not_written_over(bank, url, tmp_path):
    one, other = Bank(tmp_path / "one"), Bank(tmp_path / "other-bank")
    for each, seed in ((one, 21), (other, 22)):
        each.put(skill_of(20), "a/first")
        each.put(skill_of(seed), "b/second")
    with pytest.raises(ValueError, match="b/second@1 is another version here than there"):
        one.push(url, "a/first", "b/second", done=during(1, lambda: other.push(url, "b/second")))
    copy = Bank(tmp_path / "copy")
    copy.pull(url)
    assert copy.card("b/second") == other.card("b/second")
    assert copy.verify() == []


@pytest.mark.parametrize("seeds", [(21, 21), (21, 22)])
@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_two_that_write_the_same_number_at_once_never_mix(tmp_path, monkeypatch, kind, after, seeds):
    """The first writes file by file, as to a folder that is of another machine; the second pushes in between."""
    url = str(tmp_path / "there") if kind == "folder" else f"memory://{uuid.uuid4().hex}"
    one, other = (Bank(tmp_path / name) for name in ("one", "other"))
    for each, seed in zip((one, other), seeds, strict=True):
        each.put(skill_of(seed), "skill")
    remote, ref, count = Remote(url), Ref("skill", 1), iter(range(10))
    put = remote._put

    def slowly(path, data):
        put(path, data)
        if next(count) == after:
            with suppress(ValueError):  # another half is not taken out of the way
                other.push(url)

    monkeypatch.setattr(remote, "_put", slowly)
    refused = False
    try:
        remote._in_turn(_files(one, ref), str(ref))
    except ValueError as error:
        refused = "skill@1 is written there by somebody else as well: push again when they are done" in str(error)
        assert refused
    copy = Bank(tmp_path / "copy")
    copy.root.mkdir()
    copy.pull(url)
    assert copy.verify() == []
    assert copy.card("skill") == (other if refused else one).card("skill")
    assert refused or seeds[0] != seeds[1]


def test_an_alias_that_is_moved_meanwhile_stays(bank, other, url):
    bank.alias("walker/walk", "mine", 1)
    other.alias("walker/walk", "theirs", 2, protect=True)
    if url.startswith("hf:"):
        with pytest.raises(ValueError, match="written to by somebody else meanwhile"):
            bank.push(url, "walker/walk", done=during(1, lambda: other.push(url)))
    bank.push(url, "walker/walk", done=during(1, lambda: other.push(url)))
    other.pull(url)
    assert other.aliases("walker/walk") == {"best": 1, "mine": 1, "theirs": 2}
    assert other.moves("walker/walk")[1].protected


def test_a_folder_that_is_swept_while_it_is_pushed_to(bank, tmp_path, monkeypatch):
    there, real = Bank(tmp_path / "there"), os.fsync
    there.put(skill_of(3), "other")
    monkeypatch.setattr(os, "fsync", lambda handle: (there.gc(), real(handle)))
    assert len(bank.push(str(there.root), "walker/stand")) == 1
    monkeypatch.undo()
    assert there.verify() == []
    assert there.gc() == []
    assert not list(there.root.rglob(".partial"))


RESTS = {
    "nothing": {},
    "no file yet": {".partial": lambda _: b""},
    "half a push": {".partial": lambda _: b"", "README.md": lambda data: data, "adapter_config.json": lambda data: data[:10]},
    "no card": {name: lambda data: data for name in ("README.md", "adapter_config.json", "adapter_model.safetensors")},
    "a copy that broke off": {"adapter_config.json": lambda data: data, "adapter_model.safetensors": lambda data: data[:100]},
}


@pytest.mark.parametrize("transfer", ["push", "pull"])
@pytest.mark.parametrize("rest", RESTS)
def test_what_is_left_of_a_version_does_not_stop_a_transfer(bank, tmp_path, monkeypatch, rest, transfer):
    monkeypatch.setattr(indexing, "_SETTLED", 0)
    there = Bank(tmp_path / "there")
    bank.push(str(there.root), "walker/walk@1")
    folder = there.root / "walker/walk/2"
    folder.mkdir()
    for name, how in RESTS[rest].items():
        source = bank.path("walker/walk@2") / name
        (folder / name).write_bytes(how(source.read_bytes() if source.exists() else b""))
    there.list(damaged=lambda _: None)
    there.pull(str(bank.root)) if transfer == "pull" else bank.push(str(there.root))
    assert contents(there) == contents(bank)
    assert Ref("walker/walk", 2) in [entry.ref for entry in there.list()]
    assert (there.verify(), there.gc()) == ([], [])
    assert not (folder / ".partial").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "notes.txt", "folder", "link"])
def test_files_of_a_version_without_a_card_that_do_not_come_again_stay(bank, tmp_path, name):
    there = Bank(tmp_path / "there")
    bank.push(str(there.root))
    folder = there.root / "walker/walk/2"
    (folder / "card.json").unlink()
    if name == "folder":
        (folder / name).mkdir()
    elif name == "link":
        (folder / name).symlink_to("README.md")
    else:
        (folder / name).write_bytes(b"mine alone")
    before = sorted(folder.iterdir())
    for transfer in (lambda: bank.push(str(there.root)), lambda: there.pull(str(bank.root))):
        with pytest.raises(ValueError, match=rf"walker/walk/2' has no card.json, and its {name} is not what is to go there: restore it, or take"):
            transfer()
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("what", ["the same card", "another card", "a tombstone"])
def test_what_becomes_whole_while_it_is_taken_out_of_the_way_stays(bank, tmp_path, monkeypatch, what):
    there = Bank(tmp_path / "there")
    bank.push(str(there.root))
    folder = there.root / "walker/walk/2"
    card = (folder / "card.json").read_bytes()
    (folder / "card.json").unlink()
    name, data = {
        "the same card": ("card.json", card),
        "another card": ("card.json", bank.place.card(Ref("walker/walk", 1))),
        "a tombstone": ("tombstone.json", b""),
    }[what]
    begins = publishing._begins
    monkeypatch.setattr(publishing, "_begins", lambda *paths: ((folder / name).write_bytes(data), begins(*paths))[1])
    if what == "the same card":
        bank.push(str(there.root))
    else:
        with pytest.raises(ValueError, match=r"walker/walk@2 (is another version here than there|was removed from .* meanwhile)"):
            bank.push(str(there.root))
    assert (folder / name).read_bytes() == data
    assert (folder / "adapter_model.safetensors").exists()


def test_a_version_that_was_removed_is_neither_pushed_nor_pulled(bank, tmp_path):
    there = Bank(tmp_path / "there")
    bank.push(str(there.root))
    for one, other in ((there, bank), (bank, there)):
        kept = shutil.copytree(one.root, tmp_path / f"kept-{one.root.name}")
        one.remove("walker/run", force=True, reason="it limps")
        elsewhere = Bank(f"file://{one.root}")
        assert cards(elsewhere.list()) == cards(one.list())
        with pytest.raises(UnknownRef, match=r"walker/run@1 was removed 20.*: it limps"):
            elsewhere.get("walker/run@1")
        transfer = {there: lambda: bank.push(str(there.root)), bank: lambda: bank.pull(str(there.root))}[one]
        with pytest.raises(ValueError, match=r"walker/run@1 was removed 20.*: it limps; its number is not used again in Bank.*: name what else"):
            transfer()
        assert Ref("walker/run", 1) in [entry.ref for entry in other.list()]
        shutil.rmtree(one.root)
        kept.rename(one.root)


def test_a_damaged_version_is_not_pushed(bank, url):
    path = bank.path("walker/walk@2") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    message = r"walker/walk@2: adapter_model.safetensors does not match the hash in its card.*: it was left where it is; restore it from a copy"
    with pytest.raises(ValueError, match=message):
        bank.push(url)
    assert Ref("walker/walk", 2) not in [entry.ref for entry in Bank(url if "://" in url else f"file://{url}").list()]
    card = bank.path("walker/stand") / "card.json"
    card.write_bytes(card.read_bytes().replace(b"base", b"bass", 1))
    with pytest.raises(ValueError, match=r"walker/stand@1: card.json does not match its seal.*; restore it from a copy"):
        bank.push(url)


class Broken(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("after", range(0, 18, 3))
@pytest.mark.parametrize("kind", ["file", "s3"])
def test_an_interrupted_push_shows_no_half_and_goes_on(bank, request, monkeypatch, tmp_path, after, kind):
    url = str(tmp_path / "remote") if kind == "file" else f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}"
    where, copy = (shutil, "copyfile") if kind == "file" else (Remote(url).files, "put_file")
    real, count = getattr(where, copy), iter(range(100))

    def breaks(*arguments, **options):
        if next(count) == after:
            raise Broken
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(where, copy, breaks)
        with pytest.raises(Broken):
            bank.push(url)
    there = Bank(tmp_path / "so-far")
    there.root.mkdir()
    there.pull(url)
    assert there.verify() == []
    bank.push(url)
    whole = Bank(tmp_path / "whole")
    whole.pull(url)
    assert contents(whole) == contents(bank)


def change(url, how):
    with fsspec.open(url, "rb") as file:
        data = file.read()
    with fsspec.open(url, "wb") as file:
        file.write(how(data))


def test_what_was_changed_there_is_not_stored(bank, url, tmp_path):
    bank.push(url)
    change(f"{url}/walker/walk/2/adapter_model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    other = Bank(tmp_path / "other-bank")
    with pytest.raises(ValueError, match=r"walker/walk@2: adapter_model.safetensors did not arrive as its card says"):
        other.pull(url)
    assert Ref("walker/walk", 2) not in [entry.ref for entry in other.list()]
    assert other.verify() == []
    assert not list(other.root.glob(".tmp-*"))


@pytest.mark.parametrize("file", ["card.json", "aliases.json"])
def test_a_changed_card_or_alias_file_is_named(bank, url, tmp_path, file):
    bank.push(url)
    change(f"{url}/walker/walk/{'1/' if file == 'card.json' else ''}{file}", lambda data: data.replace(b"a", b"b", 1))
    with pytest.raises(ValueError, match=rf"walker/walk.*{file} does not match its seal"):
        Bank(tmp_path / "other-bank").pull(url)


def test_an_unknown_protocol(bank):
    with pytest.raises(ValueError, match="Protocol not known: nowhere"):
        bank.push("nowhere://x")


def test_on_the_command_line(bank, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["skillbank", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr().out.splitlines()

    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    assert run("push", there, "walker/walk@1", "--bank", bank.root) == (0, ["walker/stand@1", "walker/walk@1", f"2 pushed to {there}"])
    assert run("pull", there, "--bank", elsewhere) == (0, ["walker/stand@1", "walker/walk@1", f"2 pulled from {there}"])
    assert Bank(elsewhere).verify() == []


def cards(entries):
    return [(entry.ref, entry.kind, entry.base, entry.data) for entry in entries]


def test_a_bank_elsewhere_is_opened_where_it_is(bank, url, tmp_path):
    bank.push(url)
    url = url if "://" in url else f"file://{url}"
    there = Bank(url)
    assert repr(there) == f"Bank({url!r})"
    assert list(there.names()) == list(bank.names())
    assert cards(there.list()) == cards(bank.list())
    good = ["metrics.return.mean > 500"]
    assert cards(there.list("skill", where=good, base="walker/stand")) == cards(bank.list("skill", where=good))
    assert there.resolve("walker/walk@best") == Ref("walker/walk", 1)
    content = bank.card("walker/run").hash
    assert there.resolve(f"@sha256:{content[:8]}") == Ref("walker/run", 1)
    assert there.get("walker/walk").fingerprint == bank.get("walker/walk").fingerprint
    assert there.lineage("walker/both") == bank.lineage("walker/both")
    assert there.verify() == []
    assert [name for name, _ in there.names()] == ["walker/both", "walker/gated", "walker/run", "walker/stand", "walker/walk"]


def test_a_bank_elsewhere_is_only_read(bank, url):
    bank.push(url)
    there = Bank(url if "://" in url else f"file://{url}")
    for write in (
        lambda: there.put(skill_of(9), "walker/new"),
        lambda: there.alias("walker/walk", "best", 2),
        lambda: there.remove("walker/both"),
        lambda: there.gc(),
    ):
        with pytest.raises(ValueError, match=r"Bank\(.*\) is elsewhere, where it is only read: work on a bank in a folder and push it there"):
            write()
    assert cards(there.list()) == cards(bank.list())


def test_what_is_no_version_elsewhere_is_not_read(bank, url, tmp_path):
    bank.push(url)
    remote = Remote(url)
    for folder in ("Walker/1", "walker/walk/x", ".hidden/1", "walker/wa lk/1", *(() if url.startswith("hf:") else ("../up/1",))):
        remote.files.makedirs(remote.path(folder), exist_ok=True)
        remote.writer()({f"{folder}/card.json": b"{}"}, "a stranger")
    there = Bank(url if "://" in url else f"file://{url}")
    assert cards(there.list()) == cards(bank.list())
    assert set(Bank(tmp_path / "copy").pull(url)) == {entry.ref for entry in bank.list()}


def test_a_file_that_goes_on_is_not_read_to_its_end(bank, url, tmp_path, monkeypatch):
    bank.push(url)
    remote = Remote(url)
    remote.writer()({"walker/walk/2/adapter_model.safetensors": bytes(10**6)}, "too long")
    monkeypatch.setattr("skillbank.bank.remote._CHUNK", 1000)
    other = Bank(tmp_path / "other-bank")
    with pytest.raises(ValueError, match=r"walker/walk@2: adapter_model.safetensors did not arrive as its card says"):
        other.pull(url)


def test_no_bank_elsewhere(url):
    with pytest.raises(FileNotFoundError, match="no bank at"):
        Bank(url if "://" in url else f"file://{url}").list()


def test_what_was_read_of_a_bank_elsewhere_is_kept_and_checked(bank, tmp_path):
    url = f"file://{tmp_path}/there"
    bank.push(url)
    folder = Bank(url).path("walker/walk")
    assert folder.parent.parent.parent != tmp_path / "there"
    stamp = (folder / "card.json").stat().st_ino
    assert Bank(url).path("walker/walk") == folder
    assert (folder / "card.json").stat().st_ino == stamp, "read once"
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert Bank(url).get("walker/walk").fingerprint == bank.get("walker/walk").fingerprint
    (tmp_path / "there/walker/walk/2/adapter_model.safetensors").write_bytes(b"")
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"walker/walk@2: adapter_model.safetensors did not arrive as its card says"):
        Bank(url).get("walker/walk")
