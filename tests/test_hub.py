"""The Hugging Face Hub: a commit for each version, what it refuses, revisions, and adapters in from repositories."""

import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

import skillbank as sb
from skillbank import cli
from skillbank.bank import Bank, UnknownRef
from tests.test_bank import shipped  # noqa: F401


@pytest.fixture
def bank(shipped, tmp_path):  # noqa: F811
    return Bank(shutil.copytree(shipped.root, tmp_path / "bank"))


@pytest.fixture
def name(hub):
    hub.refuse = None
    return f"user/{uuid.uuid4().hex}"


SENT = ["walker/stand@1", "walker/walk@1", "walker/walk@2", "walker/run@1", "walker/both@1"]
TITLES = ["initial commit", *SENT, "Aliases of walker/walk"]


def test_a_version_is_one_commit_and_so_is_an_alias_file(bank, hub, name):
    repository = ("models", name)
    bank.push(f"hf://{name}", "walker/both")
    assert hub.titles(repository) == TITLES
    assert hub.visibility[repository] == "private"
    bank.push(f"hf://{name}", "walker/both")
    assert hub.titles(repository) == TITLES
    for (_, _, before), (_, title, after) in zip(hub.commits[repository][1:], hub.commits[repository][2:], strict=False):
        added = set(after) - set(before)
        folder = title.replace("@", "/")
        assert added == ({"walker/walk/aliases.json"} if "Aliases" in title else {f"{folder}/{path.name}" for path in bank.path(title).iterdir()})
    there = {path: data for path, data in hub.commits[repository][-1][2].items() if path != ".gitattributes"}
    assert there == {path: (bank.root / path).read_bytes() for path in there}


def test_few_requests_read_a_bank(bank, hub, name):
    bank.push(f"hf://{name}")
    hub.asked.clear()
    assert len(Bank(f"hf://{name}").list()) == 6
    asked = [each for each in hub.asked if "/tree/" not in each]  # the pages of the listing are short here
    assert len(asked) == 1 + 6


def test_an_existing_repository_and_other_files_in_it(bank, hub, name):
    hub.create(("models", name), {"README.md": b"mine", "notes/1/text.txt": b"", "card.json": b"{}", ".hidden/x/1/card.json": b"{}"})
    bank.push(f"hf://models/{name}/", "walker/walk", "walker/walk@1")
    assert [each for each, _ in Bank(f"hf://{name}").names()] == ["walker/stand", "walker/walk"]
    assert hub.commits["models", name][-1][2]["README.md"] == b"mine"
    assert Bank(f"hf://{name}@main").verify() == Bank(f"hf://models/{name}").verify() == []


@pytest.mark.parametrize(
    ("after", "status", "error", "message"),
    [
        (0, 500, ConnectionError, "hf://user/.* cannot be reached .*not now"),
        (2, 500, ConnectionError, "hf://user/.* cannot be reached .*check the network and try again"),
        (3, 403, PermissionError, r"hf://user/.*: the Hub refuses \(.*not now.*\): log in with `hf auth login`, with a token that may do this"),
        (5, 429, ValueError, r"hf://user/.*: the Hub refuses \(.*\).* wait where that was too much"),
    ],
)
def test_an_interrupted_push_goes_on(bank, hub, name, tmp_path, after, status, error, message):
    hub.refuse = (after, status)
    with pytest.raises(error, match=message):
        bank.push(f"hf://{name}", "walker/both")
    assert hub.titles(("models", name)) == TITLES[: 1 + after]
    hub.refuse = None
    so_far = Bank(tmp_path / "so-far")
    so_far.root.mkdir()
    assert [str(ref) for ref in so_far.pull(f"hf://{name}")] == sorted(SENT[:after], key=SENT.index)
    assert so_far.verify() == []
    assert [str(ref) for ref in bank.push(f"hf://{name}", "walker/both")] == SENT[after:]
    assert hub.titles(("models", name)) == TITLES


def test_two_that_push_at_once(bank, hub, name):
    def between(so_far, _of):
        if so_far == 1:
            hub.commit(("models", name), "theirs", {"x": b""})

    with pytest.raises(
        ValueError, match=r"hf://user/.* was written to by somebody else meanwhile: start again, what is there already does not travel"
    ):
        bank.push(f"hf://{name}", "walker/both", done=between)
    assert hub.titles(("models", name)) == ["initial commit", "walker/stand@1", "theirs"]
    assert len(bank.push(f"hf://{name}", "walker/both")) == 4
    assert Bank(f"hf://{name}").verify() == []


def test_a_revision(bank, hub, name):
    url = f"hf://{name}"
    bank.push(url, "walker/walk@1")
    first = hub.commits["models", name][-1][0]
    bank.push(url, "walker/both")
    then = Bank(f"{url}@{first}")
    assert list(then.names()) == [("walker/stand", [1]), ("walker/walk", [1])]
    assert then.aliases("walker/walk") == {"best": 1}
    with pytest.raises(UnknownRef, match=r"no 'walker/both' in Bank\('hf://user/.*@.*'\)"):
        then.get("walker/both")
    with pytest.raises(FileNotFoundError, match=r"no bank at 'hf://user/.*@nowhere'"):
        Bank(f"{url}@nowhere").list()
    with pytest.raises(
        FileNotFoundError, match=r"hf://user/.*@nowhere: no such revision on the Hub: give a branch, a tag or a commit of the repository"
    ):
        bank.push(f"{url}@nowhere")
    with pytest.raises(ValueError, match=r"the Hub refuses \(.*you can only commit to a branch"):
        bank.push(f"{url}@{first}", "walker/both")


def test_a_bank_that_is_open_sees_what_is_pushed(bank, name):
    url = f"hf://{name}"
    bank.push(url, "walker/walk@1")
    there = Bank(url)
    assert there.resolve("walker/walk").number == 1
    bank.push(url, "walker/walk@2")
    assert there.resolve("walker/walk@2").number == there.resolve("walker/walk").number == 2
    bank.alias("walker/walk", "best", 2)
    bank.push(url, "walker/walk@2")
    assert there.aliases("walker/walk") == {"best": 2}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hf://", "'hf://' cannot be opened: it names no repository on the Hub, as hf://user/repo does"),
        ("hf://datasets/alone", "'hf://datasets/alone' cannot be opened: it names no repository"),
        ("hf://user/-x", "hf://user/-x is no address on the Hub: .*'user/-x'"),
    ],
)
def test_no_address(bank, hub, url, message):
    for ask in (lambda: bank.push(url), lambda: Bank(url).list()):
        with pytest.raises(ValueError, match=message):
            ask()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("HF_HUB_OFFLINE", True, "{}: HF_HUB_OFFLINE keeps the Hub from being asked: unset it"),
        ("ENDPOINT", "http://127.0.0.1:9", r"{} cannot be reached \(.*refused\): check the network and try again"),
    ],
)
def test_no_network(bank, name, tmp_path, monkeypatch, setting, value, message):
    monkeypatch.setattr(constants, setting, value)
    for ask in (
        lambda: bank.push(f"hf://{name}"),
        lambda: Bank(tmp_path / "other").pull(f"hf://{name}"),
        lambda: Bank(f"hf://{name}").list(),
        lambda: Bank(f"hf://{name}").get("walker/walk@1"),
    ):
        with pytest.raises(ConnectionError, match=message.format(f"hf://{name}")):
            ask()
    with pytest.raises(ConnectionError, match=message.format(rf"'{name}' \(no folder here\)")):
        sb.import_adapter(name, bank, "mine/walk")


LOAD = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
net = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(4, 3)})
model = PeftModel.from_pretrained(net, sys.argv[1], subfolder="mine/walk/1")
layer = model.base_model.model["a"]
torch.testing.assert_close(layer.get_delta_weight("default"), load_file(sys.argv[2])["delta"])
"""


def adapter(folder):
    """An adapter that PEFT made, and what it adds to its layer."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(4, 3)})
    model = get_peft_model(net, LoraConfig(r=3, lora_alpha=7, target_modules=["a"], init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.base_model.model["a"].get_delta_weight("default").detach()


def files_of(folder, below=""):
    return {f"{below}{path.name}": path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def test_peft_loads_what_was_pushed(hub, name, tmp_path):
    from safetensors.torch import save_file

    save_file({"delta": adapter(tmp_path / "peft").contiguous()}, tmp_path / "delta.safetensors")
    bank = Bank(tmp_path / "bank")
    sb.import_adapter(tmp_path / "peft", bank, "mine/walk")
    bank.push(f"hf://{name}")
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", LOAD, name, str(tmp_path / "delta.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("subfolder", ["", "some/where"])
def test_an_adapter_of_a_repository_is_imported(hub, name, tmp_path, subfolder):
    delta = adapter(tmp_path / "peft")
    below = subfolder and f"{subfolder}/"
    first = hub.create(("models", name), files_of(tmp_path / "peft", below))
    hub.commit(("models", name), "nothing left", {f"{below}adapter_config.json": b"{}", f"{below}adapter_model.safetensors": b""})
    bank = Bank(tmp_path / "bank")
    ref = sb.import_adapter(name, bank, "theirs/walk", revision=first, subfolder=subfolder, card={"conf": {"a": 1}})
    assert_close(bank.get(ref).delta("a"), delta)
    card = bank.card(ref)
    source = {"repository": name, "commit": first, **({"subfolder": subfolder} if subfolder else {})}
    assert card.conf == {"a": 1, "source": source, "import": {"format": "PEFT", "scale": 1.0, "lints": []}}
    assert card.base["name"] == "org/base"
    assert card.notes == f"Imported from the PEFT adapter '{name}{subfolder and '/'}{subfolder}'."
    assert bank.verify() == []
    assert not any("README" in each for each in hub.asked if name in each), "no other file is downloaded"


def test_a_folder_goes_before_a_repository(hub, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter(tmp_path / name / "in")
    hub.asked.clear()
    bank = Bank(tmp_path / "bank")
    ref = sb.import_adapter(name, bank, "mine/walk", subfolder="in")
    assert (set(bank.card(ref).conf), hub.asked) == ({"import"}, [])
    with pytest.raises(
        ValueError, match=r"revision 'main' of 'user/.*': only a repository on the Hub, such as 'user/repo', has revisions; leave it out"
    ):
        sb.import_adapter(name, bank, "mine/walk", revision="main")
    with pytest.raises(FileNotFoundError, match="no adapter folder at '/no/where': give a local folder"):
        sb.import_adapter("/no/where", bank, "mine/walk")
    (tmp_path / "some").mkdir()
    (tmp_path / "some/expert.ckpt").touch()
    with pytest.raises(ValueError, match=r"stored as pickle \(expert.ckpt\)"):
        sb.import_adapter("some/expert.ckpt", bank, "mine/walk")
    assert hub.asked == []


def test_what_a_repository_does_not_have(hub, name, tmp_path):
    bank = Bank(tmp_path / "bank")
    with pytest.raises(
        FileNotFoundError, match=r"'user/.*' \(no folder here\): no such repository on the Hub, or a private one: check the name, or log"
    ):
        sb.import_adapter(name, bank, "mine/walk")
    hub.create(("models", name), {"one/adapter_config.json": b"{}", "two/adapter_config.json": b"{}"})
    with pytest.raises(FileNotFoundError, match=r"'user/.*' \(no folder here\): no such revision on the Hub: give a branch, a tag or a commit"):
        sb.import_adapter(name, bank, "mine/walk", revision="nowhere")
    with pytest.raises(FileNotFoundError, match=r"'user/.*' holds no adapter in its root, which takes .*: name the subfolder, there is one, two$"):
        sb.import_adapter(name, bank, "mine/walk")
    with pytest.raises(FileNotFoundError, match=r"'user/.*' holds no adapter in three, which takes .*: name the subfolder, there is one, two$"):
        sb.import_adapter(name, bank, "mine/walk", subfolder="three")
    hub.commit(("models", name), "gone", {"x": b""})
    hub.commits["models", name][-1][2].clear()
    with pytest.raises(FileNotFoundError, match=r"'user/.*' holds no adapter in its root, which takes .*: it is none that skillbank reads$"):
        sb.import_adapter(name, bank, "mine/walk")


@pytest.mark.parametrize("pickle", ["adapter_model.bin", "pytorch_adapter.bin", "expert.ckpt"])
def test_pickle_is_refused_and_not_downloaded(hub, name, tmp_path, pickle):
    hub.create(("models", name), {"x/adapter_config.json": b"{}", f"x/{pickle}": b"pickle"})
    with pytest.raises(ValueError, match=rf"'user/.*' has its weights as pickle \(x/{pickle}\), which can run code when it is read: load them where"):
        sb.import_adapter(name, Bank(tmp_path / "bank"), "mine/walk", subfolder="x")
    with pytest.raises(FileNotFoundError, match=r"'user/.*' holds no adapter in its root, which takes .*: name the subfolder, there is x$"):
        sb.import_adapter(name, Bank(tmp_path / "bank"), "mine/walk")
    assert not any(pickle in each for each in hub.asked)


@pytest.mark.parametrize("kind", ["adapters-bert", "peft-svd"])
def test_other_formats_of_a_repository_are_imported(hub, name, tmp_path, kind):
    folder = Path(__file__).parent / "golden/formats" / kind
    commit = hub.create(("models", name), files_of(folder))
    bank = Bank(tmp_path / "bank")
    ref = sb.import_adapter(name, bank, "theirs/walk")
    assert bank.card(ref).hash == bank.card(sb.import_adapter(str(folder), bank, "ours/walk")).hash
    assert bank.card(ref).conf["source"] == {"repository": name, "commit": commit}


def test_a_prediction_head_of_a_repository_is_seen(hub, name, tmp_path):
    files = files_of(Path(__file__).parent / "golden/formats/adapters-bert")
    hub.create(("models", name), {**files, "head_config.json": b"{}"})
    with pytest.raises(ValueError, match=r"head_config.json: it carries a prediction head"):
        sb.import_adapter(name, Bank(tmp_path / "bank"), "mine/walk")


def test_on_the_command_line(hub, name, bank, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["skillbank", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr()
        return stop.value.code, out.out.splitlines(), out.err.splitlines()

    url = f"hf://{name}"
    assert run("push", url, "walker/walk@1", "--bank", bank.root)[:2] == (0, ["walker/stand@1", "walker/walk@1", f"2 pushed to {url}"])
    assert run("clone", url, tmp_path / "clone")[:2] == (0, [f"2 cloned from {url} to {tmp_path / 'clone'}"])
    assert run("import", name, "mine/walk", "--revision", "main", "--subfolder", "walker/walk/1", "--bank", tmp_path / "clone")[:2] == (
        0,
        ["mine/walk@1"],
    )
    shown = run("show", "mine/walk", "--bank", tmp_path / "clone")[1]
    assert any("conf source.repository" in line and name in line for line in shown)
    code, _, err = run("import", name, "mine/walk", "--revision", "nowhere", "--bank", tmp_path / "clone")
    assert (code, len(err)) == (1, 1)
    assert "no such revision on the Hub" in err[0]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run("list", "--bank", url) == (1, [], [f"skillbank: {url}: HF_HUB_OFFLINE keeps the Hub from being asked: unset it"])
