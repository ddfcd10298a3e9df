"""Push and pull: what arrives is byte-identical and verified, what is there stays, what differs is an error, what breaks goes on."""

import logging
import shutil
import sys
import uuid

import fsspec
import pytest

from skillbank import cli
from skillbank.bank import Bank, Ref, UnknownRef
from skillbank.bank.remote import Remote
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


def test_aliases_go_on_from_each_other_or_conflict(bank, url, tmp_path):
    bank.push(url)
    other = Bank(tmp_path / "other-bank")
    other.pull(url)
    other.alias("walker/walk", "best", 2)
    other.push(url)
    bank.pull(url)
    assert bank.aliases("walker/walk") == {"best": 2}
    bank.alias("walker/walk", "best", 1)
    other.alias("walker/walk", "good", 1)
    bank.push(url)
    before = contents(other)
    for transfer in (other.push, other.pull):
        with pytest.raises(ValueError, match="alias 'best' of 'walker/walk' points at version 2 here and at version 1 there, and both were moved"):
            transfer(url)
    assert contents(other) == before


class Broken(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("after", range(0, 18, 3))
@pytest.mark.parametrize("kind", ["file", "s3"])
def test_an_interrupted_push_shows_no_half_and_goes_on(bank, request, monkeypatch, tmp_path, after, kind):
    url = str(tmp_path / "remote") if kind == "file" else f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}"
    files = Remote(url).files
    real, count = files.put_file, iter(range(100))

    def breaks(*arguments, **options):
        if next(count) == after:
            raise Broken
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, "put_file", breaks)
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
