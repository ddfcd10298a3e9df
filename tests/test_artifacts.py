"""W&B artifacts, logged for real in offline runs: what the runs' own logs say was made from what."""

import json
import struct
import sys
from collections import defaultdict

import numpy as np
import pytest
import wandb
from hydra import compose, initialize_config_dir
from wandb.proto.wandb_internal_pb2 import Record

import compose as compose_script
import skillbank as sb
import train as train_script
from skillbank import cli
from skillbank.artifacts import artifact_name
from skillbank.bank import UnknownRef
from tests.test_bank import bank, shipped  # noqa: F401
from tests.test_configs import CONF, SMALL, common

BLOCK, HEADER = 32768, 7


def records(path):
    """Records of a run's log: after 7 bytes, blocks of 32 KiB with parts of records, each behind its check sum, length and kind."""
    data, at, record = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        record, at = record + data[at + HEADER : at + HEADER + length], at + HEADER + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def runs(folder):
    """Artifacts of every offline run, in order: what it used, and what it made."""
    wandb.teardown()  # which writes what is not written yet
    found = []
    for path in folder.rglob("*.wandb"):
        used, made, runs = [], [], []
        for record in records(path):
            if record.HasField("run"):
                runs.append(record.run)
            if record.HasField("artifact"):
                (used if record.artifact.use_after_commit else made).append(record.artifact)
        found.append((runs[0].start_time.ToNanoseconds(), runs[-1].display_name, used, made))
    return [each[1:] for each in sorted(found, key=lambda each: each[0])]


def versions(artifacts):
    return [f"{artifact.name}:{next(alias for alias in artifact.aliases if alias.isdigit())}" for artifact in artifacts]


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield
    wandb.teardown()  # it reads the environment once


def test_versions_are_artifacts_with_their_lineage(bank, tmp_path):  # noqa: F811
    told = []
    logged = sb.log_artifacts(bank, ["walker/both", "walker/gated"], project="mine", done=lambda so_far, of: told.append((so_far, of)))
    assert [str(ref) for ref in logged] == [
        "walker/stand@1", "walker/walk@1", "walker/walk@2", "walker/run@1", "walker/both@1", "walker/gated@1",
    ]  # fmt: skip
    assert told == [(count, 6) for count in range(7)]
    found = {versions(made)[0]: versions(used) for _, used, made in runs(tmp_path)}
    assert found == {
        "walker.stand:1": [],
        "walker.walk:1": ["walker.stand:1"],
        "walker.walk:2": ["walker.stand:1"],
        "walker.run:1": ["walker.stand:1", "walker.walk:2"],
        "walker.both:1": ["walker.stand:1", "walker.walk:1", "walker.run:1"],
        "walker.gated:1": ["walker.stand:1", "walker.walk:2", "walker.run:1"],
    }


def test_an_artifact_holds_the_files_the_card_and_the_aliases(bank, tmp_path):  # noqa: F811
    sb.log_artifacts(bank, ["walker/walk@1"], project="mine")
    digests = defaultdict(set)
    for _, used, made in runs(tmp_path):
        for artifact in (*used, *made):
            digests[versions([artifact])[0]].add(artifact.digest)
    assert {name: len(each) for name, each in digests.items()} == {"walker.stand:1": 1, "walker.walk:1": 1}, "one content, however often it is named"
    name, _, (artifact,) = runs(tmp_path)[-1]
    assert (name, artifact.project, artifact.type, artifact.description) == ("put walker/walk@1", "mine", "skill", "Walks.")
    assert set(artifact.aliases) == {"1", "best", "latest"}
    folder = bank.path("walker/walk@1")
    assert {entry.path: entry.local_path for entry in artifact.manifest.contents} == {path.name: str(path) for path in folder.iterdir()}
    metadata, card = json.loads(artifact.metadata), bank.card("walker/walk@1")
    assert (metadata["ref"], metadata["hash"], metadata["metrics"]) == ("walker/walk@1", card.hash, {"return": {"mean": 512.25}})


def test_a_run_that_is_open_takes_the_version_alone(bank, tmp_path):  # noqa: F811
    with wandb.init(project="mine", mode="offline", dir=tmp_path) as run:
        assert [str(ref) for ref in sb.log_artifacts(bank, ["walker/walk@best"], run=run)] == ["walker/walk@1"]
    ((_, used, made),) = runs(tmp_path)
    assert (versions(used), versions(made)) == (["walker.stand:1"], ["walker.walk:1"])


def test_on_the_command_line(bank, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(sys, "argv", ["skillbank", "push", "wandb://team/mine", "walker/walk@best", "--bank", str(bank.root)])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    out, err = capsys.readouterr()
    assert out == "walker/stand@1\nwalker/walk@1\n2 pushed to wandb://team/mine\n"
    assert "not logged in, so that it stays in the folder wandb/ here; `wandb sync` uploads it" in err
    wandb.teardown()
    (run,) = {(record.run.entity, record.run.project) for path in tmp_path.rglob("*.wandb") for record in records(path) if record.HasField("run")}
    assert run == ("team", "mine")
    monkeypatch.setattr(sys, "argv", ["skillbank", "push", "wandb://", "--bank", str(bank.root)])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert "no project: name one, such as wandb://skillbank" in capsys.readouterr().err


def test_what_cannot_be_logged(bank, tmp_path):  # noqa: F811
    with pytest.raises(UnknownRef, match="no 'walker/wlak' in"):
        sb.log_artifacts(bank, ["walker/wlak"])
    assert runs(tmp_path) == []


def test_a_damaged_version_is_not_logged(bank, tmp_path):  # noqa: F811
    path = bank.path("walker/stand@1") / "model.json"
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    message = r"walker/stand@1: model.json does not match the hash in its card.*: it was left where it is; restore it from a copy"
    with pytest.raises(ValueError, match=message):
        sb.log_artifacts(bank, ["walker/walk@1"], project="mine")
    assert runs(tmp_path) == []
    with wandb.init(project="mine", mode="offline", dir=tmp_path) as run, pytest.raises(ValueError, match=message):
        sb.log_artifacts(bank, ["walker/walk@1"], run=run)
    assert [(used, made) for _, used, made in runs(tmp_path)] == [([], [])]


@pytest.mark.parametrize("names", [["a/b", "a.b", "a..b"], ["a/b.c", "a.b/c", "a/b/c", "a.b.c"]])
def test_no_two_names_become_one(names):
    made = [artifact_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert not any("/" in name for name in made)


def configured(name, *overrides):
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(name, [*overrides, "logger=wandb"])


def test_training_and_what_it_put_are_one_run(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("stand", "walk"):
        arrays = {"observations": rng.normal(size=(3, 30, 24)), "actions": rng.uniform(-1, 1, (3, 30, 6)), "rewards": rng.random((3, 30))}
        np.savez(tmp_path / f"{name}.npz", **{key: value.astype(np.float32) for key, value in arrays.items()})
    train_script.train(configured("train", "task=walker/stand", "fit=base", *SMALL, *common("stand")))
    train_script.train(configured("train", "base=walker/stand", "lora.rank=2", *common("walk")))
    options = ("skills=[walker/walk]", "merge=stack", "report=false", *common("walk"))
    compose_script.compose(configured("compose", *options))
    found = runs(tmp_path)
    assert [(name, versions(used), versions(made)) for name, used, made in found] == [
        ("walker/stand", [], ["walker.stand:1"]),
        ("walker/walk", ["walker.stand:1"], ["walker.walk:1"]),
        ("walker/walk-from-stand@1", ["walker.stand:1", "walker.walk:1"], ["walker.walk-from-stand:1"]),
    ]
    kinds = [{record.WhichOneof("record_type") for record in records(path)} for path in sorted(tmp_path.rglob("*.wandb"))]
    assert sum("history" in each for each in kinds) == 2, "the curves of both trainings"
