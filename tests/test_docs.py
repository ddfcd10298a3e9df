"""The examples of the pages in docs/ run, in their order."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb

import skillbank
from skillbank import cli
from skillbank.merge import METHODS, described
from skillbank.report import markdown

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(python)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("page", "least"), [("docs/bank.md", 10), ("docs/merge.md", 4), ("docs/runtime.md", 0)])
def test_every_example_of_a_page(page, least, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "adapters", tmp_path / "adapters")
    (tmp_path / "demos").symlink_to(ROOT / "demos")
    monkeypatch.chdir(tmp_path)
    names, commands = {}, 0
    for language, code in BLOCK.findall((ROOT / page).read_text()):
        if language:
            exec(compile(code, page, "exec"), names)
            continue
        for line in code.splitlines():
            if line.startswith("skillbank "):
                monkeypatch.setattr(sys, "argv", shlex.split(line))
                with pytest.raises(SystemExit) as stop:
                    cli.main()
                assert stop.value.code == 0, line
                commands += 1
    wandb.teardown()  # it reads the environment once
    assert commands >= least
    assert names["bank"].verify() == []
    METHODS.pop("strongest", None)


def test_the_table_of_merge_methods_is_the_one_that_they_tell():
    rows = [{key: value.replace("|", "\\|") for key, value in row.items()} for row in described()]
    assert markdown(rows) in (ROOT / "docs/merge.md").read_text()
    assert len(rows) >= 25
    yamls = {path.stem for path in (ROOT / "conf/merge").glob("*.yaml")}
    assert yamls == set(METHODS) - {"fisher", "regmean"}  # which need statistics of the tasks


PAGES = {
    "merge": ["merge", "merge_files", "merge_entries", "merge_quality", "folding"],
    "runtime": ["runtime", "policy", "training"],
    "language": ["strings", "language", "real_model"],
    "walker": ["discovery", "gate_by_reward"],
    "safe": ["psec_safe", "psec_safe_bullet"],
}


@pytest.mark.parametrize(("page", "name"), [(page, name) for page, names in PAGES.items() for name in names])
def test_pages_show_what_is_stored(page, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--from-results"])
    import_module(f"benchmarks.{name}").main()
    assert capsys.readouterr().out.strip() in (ROOT / f"docs/{page}.md").read_text()


def test_the_language_section_of_the_readme(tmp_path):
    """Its answers are given, and its commands, all of them, run in their order."""
    section = re.search(r"^## Language\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL).group(1)
    python, commands = (code for _, code in BLOCK.findall(section))
    shutil.copytree(ROOT / "adapters/strings", tmp_path / "adapters/strings")
    (tmp_path / "demos").symlink_to(ROOT / "demos")
    names = {"sb": SimpleNamespace(load=partial(skillbank.load, bank=tmp_path / "adapters"), complete=skillbank.complete)}
    for line in python.splitlines():
        code, _, comment = line.partition("# ")
        if comment.startswith("["):
            assert str(eval(code, names)) == comment.partition(":")[0]
        else:
            exec(code, names)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    lines = [line.partition(" #")[0].replace("python ", f"python {ROOT}/") for line in commands.splitlines()]
    done = subprocess.run(["bash", "-e", "-c", "\n".join(lines)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(re.findall(r"^\| (\S+)@1 +\| few +\| (\S+)", done.stdout, re.MULTILINE))
    assert float(found["strings/base"]) < 0.3 < 0.6 < min(float(found["strings/r"]), float(found["mine"]))
    assert (tmp_path / "out/config.json").exists()
