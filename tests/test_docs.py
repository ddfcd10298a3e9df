"""The examples of the pages in docs/ run, in their order."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import wandb

from skillbank import cli

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(python)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_example_of_the_bank_page(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "adapters", tmp_path / "adapters")
    (tmp_path / "demos").symlink_to(ROOT / "demos")
    monkeypatch.chdir(tmp_path)
    names, commands = {}, 0
    for language, code in BLOCK.findall((ROOT / "docs/bank.md").read_text()):
        if language:
            exec(compile(code, "docs/bank.md", "exec"), names)
            continue
        for line in code.splitlines():
            if line.startswith("skillbank "):
                monkeypatch.setattr(sys, "argv", shlex.split(line))
                with pytest.raises(SystemExit) as stop:
                    cli.main()
                assert stop.value.code == 0, line
                commands += 1
    wandb.teardown()  # it reads the environment once
    assert commands > 10
    assert [str(ref) for ref in names["bank"].dependents("walker/walk")]
    assert names["good"]
