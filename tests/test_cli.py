"""The command line: tables, exit codes, and errors of one line."""

import errno
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from skillbank import cli
from skillbank.bank import Bank, Base, Composition
from skillbank.bank import index as indexing
from skillbank.skill import Skill

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    bank = Bank(tmp_path_factory.mktemp("shipped"))
    bank.put(Base({"_target_": "x.Y"}, {"net.a.weight": torch.ones(4, 6)}), "walker/stand")
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        skill = Skill({"a": (torch.randn(2, 6, generator=generator), torch.randn(4, 2, generator=generator))})
        bank.put(
            skill,
            "walker/walk",
            card={"base": "walker/stand", "metrics": {"loss": 0.5, "return": 512.25, "seconds": 7.0}, "conf": {"lora": {"rank": 2}}},
        )
    merge = {"method": "stack", "weights": [0.75, 0.25]}
    bank.put(Composition("walker/stand", ("walker/walk@1", "walker/walk@2"), merge=merge), "walker/both")
    bank.alias("walker/walk", "best", 1)
    return bank


@pytest.fixture
def bank(shipped, tmp_path):
    return Bank(shutil.copytree(shipped.root, tmp_path / "bank"))


@pytest.fixture
def run(bank, monkeypatch, capsys):
    def run(*arguments, folder=bank.root, columns=160):
        monkeypatch.setattr(sys, "argv", ["skillbank", *arguments, *(["--bank", str(folder)] if folder else [])])
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr()
        return stop.value.code, out.out, out.err

    return run


def test_list(run):
    code, out, _ = run("list")
    assert code == 0
    assert re.search(r"walker/walk@2 +return 512.25, loss 0.5 +skill +walker/stand@1", out)
    assert "walker/walk@1" not in out
    assert "walker/walk" not in run("list", "--kind", "base")[1]
    assert "walker/stand" not in run("list", "walker/w*")[1].replace("walker/stand@1", "")


def test_list_what_is_asked_for(run):
    def listed(*arguments):
        code, out, err = run("list", "--json", *arguments)
        assert code == 0, err
        return [entry["ref"] for entry in json.loads(out)]

    assert listed() == ["walker/both@1", "walker/stand@1", "walker/walk@2"]
    assert listed("--all", "--kind", "skill") == ["walker/walk@1", "walker/walk@2"]
    assert listed("--base", "walker/stand") == ["walker/both@1", "walker/walk@2"]
    assert listed("--where", "metrics.return > 500", "--where", "conf.lora.rank = 2") == ["walker/walk@2"]
    assert listed("--where", "metrics.return > 600") == []
    assert listed("--all", "--sort", "metrics.return") == ["walker/walk@1", "walker/walk@2"]
    code, _, err = run("list", "--where", "return")
    assert (code, err[:45]) == (1, "skillbank: 'return' is no condition: give a f")
    code, _, err = run("list", "--base", "walker/satnd")
    assert (code, "did you mean 'walker/stand'" in err) == (1, True)


def test_show_as_json(run, bank):
    code, out, _ = run("show", "walker/walk", "--json")
    assert code == 0
    assert json.loads(out)["hash"] == bank.card("walker/walk").hash


@pytest.mark.parametrize(("width", "last"), [(80, "base"), (50, "metrics"), (8, "ref")])
def test_list_never_breaks_a_reference(run, monkeypatch, width, last):
    code, out, _ = run("list", columns=width)
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[3:-1]] == ["walker/both@1", "walker/stand@1", "walker/walk@2"]
    assert lines[1].split()[-1] == last
    assert width == 8 or max(map(len, lines)) <= width


def test_show(run):
    code, out, _ = run("show", "walker/walk@best")
    assert code == 0
    for words in ("walker/walk@1", "skill", "base +walker/stand@1", "metric return +512.25", "conf lora.rank +2", "alias +best", "adapter_model"):
        assert re.search(words, out), words
    assert re.search(r"parent +0.75 walker/walk@1", run("show", "walker/both")[1])


def test_log(run):
    code, out, _ = run("log", "walker/walk")
    assert code == 0
    assert out.index("walker/walk@2") < out.index("walker/walk@1")
    assert "best" in out


def test_log_shows_how_aliases_moved(run, bank):
    bank.alias("walker/walk", "best", None)
    assert re.search(r"20\d\d-\S+ +best +taken away", run("log", "walker/walk")[1])


def test_log_graph(run):
    code, out, _ = run("log", "walker/both", "--graph")
    assert code == 0
    lines = [line.strip(" │├└─") for line in out.splitlines()]
    assert [line.partition(" (")[0] for line in lines] == [
        "walker/both@1", "walker/stand@1", "0.75 walker/walk@1", "walker/stand@1", "0.25 walker/walk@2", "walker/stand@1",
    ]  # fmt: skip


def test_alias(run, bank):
    assert run("alias", "walker/walk", "new", "--expect", "0", "--protect")[:2] == (0, "walker/walk@new is walker/walk@2\n")
    code, _, err = run("alias", "walker/walk@1", "new")
    assert (code, err) == (1, "skillbank: alias 'new' of 'walker/walk' is protected at version 2: unprotect it in the same call\n")
    code, _, err = run("alias", "walker/walk@1", "best", "--expect", "2")
    assert code == 1
    assert "points at version 1, not at version 2 as expected" in err
    assert run("alias", "walker/walk", "new", "--delete", "--no-protect")[:2] == (0, "walker/walk@new is taken away\n")
    assert bank.aliases("walker/walk") == {"best": 1}
    code, out, err = run("alias", "walker/walk", "bset", "--delete")
    assert (code, out) == (1, "")
    assert re.match(r"skillbank: 'walker/walk' has no alias 'bset' in Bank.*: did you mean 'best'\?", err)


def test_rm_and_gc(run, bank):
    code, _, err = run("rm", "walker/walk@2")
    assert code == 1
    assert "walker/walk@2 is needed by walker/both@1" in err
    assert run("rm", "walker/both", "--reason", "a trial")[:2] == (0, "walker/both@1 is removed\n")
    assert "walker/both" not in run("list")[1]
    left = bank.root / ".tmp-0"
    left.mkdir()
    assert run("gc", "--dry-run")[:2] == (0, f"{left}\n1 to remove\n")
    assert run("gc")[:2] == (0, f"{left}\n1 removed\n")
    assert run("gc")[:2] == (0, "0 removed\n")
    code, out, err = run("gc", folder=bank.root / "nowhere")
    assert (code, out) == (1, "")
    assert re.match("skillbank: no bank at .*nowhere': give the folder of a bank", err)


def test_a_damaged_card_leaves_the_rest_of_the_bank_usable(run, bank):
    card = bank.path("walker/walk@2") / "card.json"
    card.write_bytes(card.read_bytes().replace(b"512.25", b"612.25"))
    code, out, err = run("list", "--json", "--all")
    assert (code, [entry["ref"] for entry in json.loads(out)]) == (0, ["walker/both@1", "walker/stand@1", "walker/walk@1"])
    way_out = "`skillbank rm walker/walk@2 --force` takes it away"
    assert re.fullmatch(rf"skillbank: walker/walk@2: card.json does not match its seal.*; restore it from a copy; {way_out}\n", err)
    for ref in ("walker/walk@1", "walker/walk@2"):
        code, _, err = run("rm", ref)
        assert (code, way_out in err) == (1, True)
    assert run("rm", "walker/walk@2", "--force")[:2] == (0, "walker/walk@2 is removed\n")
    assert run("list", "--all")[2] == ""
    assert "walker/walk@2" not in run("list", "--all")[1]
    assert "needed by walker/both@1" in run("rm", "walker/walk@1")[2]


def test_a_card_that_is_damaged_after_it_was_listed_leaves_the_rest_listed(run, bank, monkeypatch):
    monkeypatch.setattr(indexing, "_SETTLED", 0)
    assert "walker/walk@2" in run("list")[1]
    card = bank.path("walker/walk@2") / "card.json"
    card.write_bytes(card.read_bytes().replace(b"512.25", b"612.25"))
    said = r"skillbank: walker/walk@2: card.json does not match its seal.*; `skillbank rm walker/walk@2 --force` takes it away\n"
    for options in ((), ("--all",), ("--where", "kind != x"), ("--sort", "metrics.return"), ("--text", "WALK")):
        code, out, err = run("list", "--kind", "skill", "--json", *options)
        assert (code, [entry["ref"] for entry in json.loads(out)]) == (0, ["walker/walk@1"])
        assert re.fullmatch(said, err)
    for command in (("dedup",), ("similar", "walker/walk@1")):
        code, out, err = run(*command)
        assert (code, out) == (1, "")
        assert re.fullmatch(said, err)


def test_metrics_of_any_form_are_shown(run, bank):
    bank.put(bank.get("walker/walk@1"), "odd", card={"metrics": {"return": {"mean": 5.0}, "loss": None, "validation": "none", "steps": 3}})
    for command in (("list", "odd"), ("log", "odd")):
        code, out, err = run(*command)
        assert (code, "steps 3" in out) == (0, True), err


def test_what_is_not_finite_is_null_in_json(run, bank):
    bank.put(Skill({"a": (torch.ones(1, 6), torch.ones(4, 1)), "b": (torch.ones(1, 6), torch.ones(4, 1))}), "more")
    code, out, _ = run("diff", "walker/walk@1", "more", "--json")
    assert code == 0
    assert json.loads(out, parse_constant=pytest.fail)["distance"]["b"] is None


def test_diff_shows_every_parent(run, bank):
    for name, first, weight in (("one", "walker/walk@1", 0.1), ("two", "walker/walk@2", 0.9)):
        skill = bank.get("walker/walk@1" if name == "one" else "walker/walk@2")
        bank.put(skill, name, card={"parents": [{"ref": first, "weight": weight}, {"ref": "walker/stand", "weight": 1}]})
    card = json.loads(run("diff", "one", "two", "--json")[1])["card"]
    assert card["parent"] == ["0.1 walker/walk@1, 1 walker/stand@1", "0.9 walker/walk@2, 1 walker/stand@1"]


def test_verify_of_a_damaged_bank_elsewhere_answers_in_json(run, bank):
    for ref, name in (("walker/walk@1", "adapter_model.safetensors"), ("walker/both@1", "composition.json")):
        path = bank.path(ref) / name
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    (bank.path("walker/walk@2") / "adapter_config.json").unlink()
    code, out, _ = run("verify", "--json", folder=f"file://{bank.root}")
    problems = {each["ref"]: each["what"] for each in json.loads(out)["problems"]}
    assert (code, sorted(problems)) == (1, ["walker/both@1", "walker/walk@1", "walker/walk@2"])
    assert "names files that cannot be had" in problems["walker/walk@1"]
    assert "adapter_model.safetensors did not arrive as its card says" in problems["walker/walk@1"]
    assert "adapter_config.json" in problems["walker/walk@2"]


def test_verify(run, bank):
    assert run("verify")[:2] == (0, "4 versions are intact\n")
    assert run("verify", "walker/walk")[:2] == (0, "walker/walk@2 is intact\n")
    path = bank.path("walker/walk@1") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    code, out, err = run("verify")
    assert (code, out) == (1, "")
    assert "walker/walk@1: adapter_model.safetensors does not match the hash" in err
    assert run("verify", "walker/walk@2")[0] == 0


def test_every_command_answers_in_json(run, bank, tmp_path):
    def told(*arguments, expected=0, **options):
        code, out, err = run(*arguments, "--json", **options)
        assert code == expected, err
        return json.loads(out)

    log = told("log", "walker/walk")
    assert [(each["ref"], each["aliases"]) for each in log["versions"]] == [("walker/walk@2", []), ("walker/walk@1", ["best"])]
    assert (log["versions"][0]["metrics"]["return"], log["moves"][0]["alias"]) == (512.25, "best")
    assert told("log", "walker/both", "--graph")["parents"][0]["ref"] == "walker/walk@1"
    assert told("alias", "walker/walk", "new") == {"name": "walker/walk", "alias": "new", "ref": "walker/walk@2"}
    assert told("alias", "walker/walk", "new", "--delete")["ref"] is None
    out = str(tmp_path / "out")
    assert told("export", "walker/walk", out) == {"ref": "walker/walk@2", "folder": out}
    assert told("import", out, "mine") == {"ref": "mine@1", "lints": []}
    assert told("base", str(bank.path("walker/stand")), "stand") == {"ref": "stand@1"}
    there = str(tmp_path / "there")
    every = ["mine@1", "stand@1", "walker/stand@1", "walker/walk@1", "walker/walk@2", "walker/both@1"]
    sent = told("push", there)
    assert (sent["url"], sorted(sent["refs"])) == (there, sorted(every))
    assert told("pull", there) == {"url": there, "refs": []}
    cloned = told("clone", there, str(tmp_path / "clone"), folder=None)
    assert sorted(cloned["refs"]) == sorted(every)
    assert told("dedup") == []
    assert {each["ref"] for each in told("similar", "walker/walk@1")} == {"walker/walk@2"}
    assert told("verify") == {"versions": 6, "problems": []}
    assert told("rm", "mine", "--reason", "a trial") == {"ref": "mine@1", "reason": "a trial"}
    (bank.root / ".tmp-0").mkdir()
    assert told("gc", "--dry-run") == {"paths": [str(bank.root / ".tmp-0")], "removed": False}
    assert told("gc")["removed"] is True
    assert set(told("diff", "walker/walk@1", "walker/walk@2")["distance"]) == {"a"}
    (bank.path("walker/walk@1") / "card.json").unlink()
    problems = {problem["ref"]: problem for problem in told("verify", expected=1)["problems"]}
    assert (problems["walker/walk@1"]["file"], problems["walker/walk@1"]["affects"]) == ("card.json", ["walker/both@1"])


def test_merge_is_looked_at_and_put(run, bank):
    code, out, _ = run("merge", "walker/walk@1", "walker/walk@2", "--weights", ".75,-.5")
    assert code == 0
    assert out.startswith("stack: exactly the weighted sum")
    assert len(bank.versions("mine")) == 0
    code, out, err = run(
        "merge", "walker/walk@1", "walker/walk@best", "walker/walk@2", *("--method", "ties", "--set", "density=0.5"), "-o", "mine", "--json"
    )
    assert code == 0, err
    told = json.loads(out)
    assert (told["ref"], told["certificate"]["method"]) == ("mine@1", "ties")
    card = bank.card("mine")
    assert [(each["ref"], each["weight"]) for each in card.parents] == [("walker/walk@1", None), ("walker/walk@1", None), ("walker/walk@2", None)]
    assert card.conf["merge"] == {"method": "ties", "density": 0.5}
    assert card.base["ref"] == "walker/stand@1"
    code, out, _ = run("rebuild", "mine")
    assert (code, out) == (0, "mine@1 is bit-equal\n")
    two = run(
        "merge", "walker/walk@1", "walker/walk@2", "--weights", "{'a': 1, '*': 0}, -1", "--method", "svd", "--rank", "1", "-o", "mine", "--json"
    )
    assert json.loads(two[1])["ref"] == "mine@2"
    assert (bank.card("mine@2").conf["merge"]["weights"], bank.get("mine@2").ranks) == ([{"a": 1, "*": 0}, -1], {"a": 1})
    assert run("rebuild", "mine@2")[0] == 0


def test_a_merge_without_measure_is_put(run, bank):
    code, out, err = run("merge", "walker/walk@1", "walker/walk@1", "--weights", "1,-1", "--method", "magmax", "-o", "mine", "--json")
    assert code == 0, err
    assert json.loads(out)["certificate"]["error"] is None
    assert bank.card("mine").metrics == {"merge_energy": 0.0}
    code, out, _ = run("merge", "walker/walk@1", "walker/walk@2", "--method", "svd", "--set", "rank=1")
    assert (code, "of its energy is kept" in out) == (0, True)


def test_methods(run):
    code, out, _ = run("methods", folder=None)
    assert code == 0
    assert "ties" in out
    assert {row["method"] for row in json.loads(run("methods", "--json", folder=None)[1])} >= {"stack", "tsv_m", "dare"}


def test_no_command_is_without_json():
    assert {
        command.name or command.callback.__name__ for command in cli.app.registered_commands if "json" not in signature(command.callback)
    } == set()


def signature(function):
    return inspect.signature(function).parameters


def completed(bank, shell, words):
    """What a shell is told to offer for the last of the words."""
    index = words.count(" ")
    variables = {"complete_bash": {"COMP_WORDS": words, "COMP_CWORD": str(index)}, "complete_zsh": {"_TYPER_COMPLETE_ARGS": words}}[shell]
    env = {**os.environ, **variables, "_SKILLBANK_COMPLETE": shell, "SKILLBANK": str(bank.root)}
    command = [sys.executable, "-X", "importtime", "-c", "import sys; sys.argv[0] = 'skillbank'; from skillbank.cli import main; main()"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert not {"torch", "numpy", "fsspec"} & {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    return re.findall(r"[\w/@:.-]*walker/[\w/@:.-]*", done.stdout)


@pytest.mark.parametrize("shell", ["complete_bash", "complete_zsh"])
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("skillbank show w", ["walker/both", "walker/stand", "walker/walk"]),
        ("skillbank show walker/walk", ["walker/walk", "walker/walk@best", "walker/walk@1", "walker/walk@2"]),
        ("skillbank diff walker/walk walker/s", ["walker/stand"]),
        ("skillbank push memory://x walker/b", ["walker/both"]),
        ("skillbank list --base walker/s", ["walker/stand"]),
        ("skillbank rm x", []),
        ("skillbank show --bank s3://bucket/bank w", []),
        ("skillbank show --bank nowhere w", []),
    ],
)
def test_shells_complete_references(bank, shell, words, offered):
    assert completed(bank, shell, words) == offered


def test_what_completes_after_the_at(bank):
    assert completed(bank, "complete_zsh", "skillbank show walker/walk@b") == ["walker/walk@best"]
    assert completed(bank, "complete_zsh", "skillbank show walker/none@") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed(tmp_path, shell):
    """For the shell that the command is run from, which the option reads off the process tree."""
    env = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "True"}
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'skillbank'; from skillbank.cli import main; main()", "--install-completion", shell],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert any("_SKILLBANK_COMPLETE" in text for text in written)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "walker/wlak"), "no 'walker/wlak' .* did you mean 'walker/walk'"),
        (("show", "Walk"), "'Walk' is not a name"),
        (("log", "walker/walk@1"), "'walker/walk@1' is not a name"),
        (("list", "--kind", "gate"), "kind='gate': a bank holds"),
        (("merge", "walker/walk@1", "walker/both"), "only skills can be merged, walker/both@1 is a composition"),
        (("merge", "walker/walk@1", "--method", "ties2"), "unknown merge method 'ties2': did you mean 'ties'"),
        (("merge", "walker/walk@1", "--method", "ties", "--set", "densty=0.5"), "merge method 'ties' takes no 'densty': did you mean 'density'"),
        (("merge", "walker/walk@1", "--method", "ties", "--set", "density=2"), r"density is a share of the entries in \(0, 1\], got 2"),
        (("merge", "walker/walk@1", "--set", "rank"), "--set 'rank' sets nothing"),
        (("merge", "walker/walk@1", "--method", "svd", "--rank", "1", "--set", "rank=2"), "--set rank=... is what --rank is for"),
        (("merge", "walker/walk@1", "--set", "method=ties"), "--set method=... is what --method is for"),
        (("merge", "walker/walk@1", "--method", "ties", "--set", "density=high"), r"density is a share of the entries in \(0, 1\], got 'high'"),
        (("merge", "walker/walk@1", "--method", "opcm", "--set", "share=high"), "'opcm' cannot do with {'share': 'high'}"),
        (("merge", "walker/walk@1", "--weights", "a,b"), "--weights 'a,b' are no numbers: write them as .6,-.4"),
        (("merge", "walker/walk@1", "--weights", "1,2"), "got 2 weights for 1 skills"),
    ],
)
def test_user_errors_are_one_line(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert re.match(f"skillbank: {message}", err)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "no space left for the bank: make room"), "no space left for the bank: make room"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "Not a directory: 'a/b'"),
        (FloatingPointError("the loss is nan"), "the loss is nan"),
    ],
)
def test_errors_of_the_disk_and_of_numbers_are_one_line(error, message, capsys):
    @cli.user_errors
    def broken():
        raise error

    with pytest.raises(SystemExit, match="1"):
        broken()
    assert capsys.readouterr().err == f"skillbank: {message}\n"


def test_no_bank(run, tmp_path, monkeypatch):
    assert re.match("skillbank: no bank at .*nowhere", run("list", folder=tmp_path / "nowhere")[2])
    monkeypatch.setenv("SKILLBANK", str(tmp_path / "elsewhere"))
    assert re.match("skillbank: no bank at .*elsewhere", run("list", folder=None)[2])


def test_wrong_usage_exits_with_2(run):
    assert run("lst")[0] == 2
    assert run("show")[0] == 2


def test_help_says_what_exit_codes_mean(run):
    code, out, _ = run("--help", folder=None)
    assert (code, "Exit codes: 0, all is well; 1, " in out) == (0, True)


@pytest.mark.parametrize("arguments", [["--help"], ["list"]])
def test_it_starts_without_what_is_slow_to_import(bank, arguments):
    command = [sys.executable, "-X", "importtime", "-m", "skillbank.cli", *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "SKILLBANK": str(bank.root)}, check=True, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not {"torch", "numpy", "peft", "transformers", "safetensors", "fsspec", "huggingface_hub"} & imported


def test_user_errors_keeps_other_tracebacks():
    @cli.user_errors
    def broken():
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        broken()
