"""Bases by reference: hashed where they are, linked to by skills, never copied."""

import copy
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import skillbank as sb
from skillbank import cli
from skillbank.bank import base_fingerprint
from skillbank.skill import digest


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Its checkpoint in several shards, as it lies in the Hub's cache."""
    path = tmp_path_factory.mktemp("hub") / "models--maker--tiny-gpt2" / "snapshots" / ("ab" * 20)
    model.save_pretrained(path, max_shard_size="16KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture
def bank(folder, tmp_path):
    bank = sb.Bank(tmp_path / "bank")
    bank.put(sb.Checkpoint.scan(folder), "gpt2")
    return bank


def test_what_a_scan_tells(folder, model):
    scanned = sb.Checkpoint.scan(folder, workers=1)
    assert (scanned.repo, scanned.revision) == ("maker/tiny-gpt2", "ab" * 20)
    assert {name: entry["size"] for name, entry in scanned.files.items()} == {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert scanned.weights == {name: digest({"": tensor}) for name, tensor in tensors.items()}
    assert scanned.differences(folder) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_dtypes_are_told_apart_in_torchs_words(tmp_path, dtype):
    tensor = torch.arange(6).view(2, 3).to(dtype)
    save_file({"w.weight": tensor, "empty": torch.zeros(0, 4, dtype=dtype)}, tmp_path / "model.safetensors")
    assert sb.Checkpoint.scan(tmp_path).weights["w.weight"] == digest({"": tensor})


def test_a_checkpoint_of_very_many_weights_is_read_and_what_is_too_large_is_not_put(tmp_path, monkeypatch):
    bank, files = sb.Bank(tmp_path / "bank"), {"model.safetensors": {"sha256": "a" * 64, "size": 1}}
    many = sb.Checkpoint("maker/large", None, files, {f"{i}{'w' * 4000}": "b" * 64 for i in range(4500)})
    ref = bank.put(many, "large")
    assert (bank.path(ref) / "checkpoint.json").stat().st_size > 2**24
    assert bank.get(ref) == many
    assert bank.verify() == []
    monkeypatch.setattr("skillbank.bank.records._LARGEST_CHECKPOINT", 2**24)
    with pytest.raises(ValueError, match=r"the checkpoint has 18.* bytes as JSON, more than the 16777216 that are read of checkpoint.json: make it"):
        bank.put(many, "larger")
    base = sb.Base({"_target_": "x.Y", "text": "x" * 2**24}, {"net.a.weight": torch.ones(1, 1)})
    with pytest.raises(ValueError, match=r"the model's conf has 16777.* bytes as JSON, more than the 16777216 that are read of model.json: make it"):
        bank.put(base, "base")
    assert [str(entry.ref) for entry in bank.list()] == ["large@1"]


def test_every_byte_is_read_once(tmp_path):
    save_file({f"m{i}.weight": torch.randn(512, 512) for i in range(4)}, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size

    def read():
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    if not Path("/proc/self/io").exists():
        pytest.skip("this system does not count what a process reads")
    before = read()
    sb.Checkpoint.scan(tmp_path, workers=1)
    assert size <= read() - before < 1.1 * size


def test_a_skill_is_linked_to_it_and_checked_against_the_live_model(bank, model, folder):
    skill = sb.Skill({f"transformer.h.{i}.attn.c_attn": (torch.randn(2, 16), torch.randn(48, 2)) for i in range(2)})
    ref = bank.put(skill, "skill", card={"base": "gpt2"})
    assert bank.card(ref).base["fingerprint"] == base_fingerprint(model.state_dict(), skill)
    assert bank.verify() == []
    assert sb.Checkpoint(**vars(bank.get("gpt2"))) == bank.get("gpt2")
    sb.check_base(bank, "skill", model)
    other = GPT2LMHeadModel(model.config)
    with pytest.raises(ValueError, match=r"skill 'skill' was trained on base 'gpt2@1' \(\w{12}\), this model is \w{12}"):
        sb.check_base(bank, "skill", other)
    with pytest.raises(ValueError, match="the bank knows the checkpoint 'maker/tiny-gpt2' by its hashes only, and there is no causal language model"):
        sb.load("skill", bank)
    with pytest.raises(ConnectionError, match="maker/tiny-gpt2"):
        sb.export("skill", bank.root.parent / "out", bank, merged=True)
    assert not (bank.root.parent / "out").exists()
    sb.export("skill", bank.root.parent / "out", bank, merged=True, weights=folder)
    sb.fold(other := copy.deepcopy(model), skill)
    written = GPT2LMHeadModel.from_pretrained(bank.root.parent / "out")
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in written.state_dict().items())


def test_a_module_that_it_does_not_have(bank):
    stranger = sb.Skill({"transformer.h.0.attn.c_atn": (torch.ones(1, 16), torch.ones(48, 1))})
    with pytest.raises(ValueError, match=r"the base has no module 'transformer.h.0.attn.c_atn' .* did you mean 'transformer.h.0.attn.c_attn'"):
        bank.put(stranger, "stranger", card={"base": "gpt2"})


def test_the_same_checkpoint_is_the_same_version(bank, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert str(bank.put(sb.Checkpoint.scan(folder), "gpt2")) == "gpt2@1"
    assert str(bank.put(sb.Checkpoint.scan(copy, repo="maker/tiny-gpt2", revision="ab" * 20), "gpt2")) == "gpt2@1"
    assert sb.Checkpoint.scan(copy).repo == str(copy.resolve())


def test_what_differs_in_a_folder(folder, tmp_path):
    scanned, copy = sb.Checkpoint.scan(folder), shutil.copytree(folder, tmp_path / "copy")
    first, second, *_ = sorted(copy.glob("*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    second.unlink()
    assert scanned.differences(copy) == [f"{second.name} is missing", f"{first.name} is another"]


def changed(data, **entry):
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["a"] |= entry
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:5], "is no safetensors file: its header has"),
        (lambda data: (2**60).to_bytes(8, "little") + data[8:], f"its header has {2**60} bytes"),
        (lambda data: data[:8] + b"x" + data[9:], "its header cannot be read"),
        (lambda data: changed(data, data_offsets=[0]), "its header cannot be read"),
        (lambda data: changed(data, data_offsets=["0", "8"]), "its header cannot be read|overlap"),
        (lambda data: changed(data, data_offsets=[8, 32]), "its tensors overlap, or leave bytes between"),
        (lambda data: changed(data, data_offsets=[0, 2**40]), "its tensors overlap, or leave bytes between"),
        (lambda data: data[:-4], "its tensors overlap, or leave bytes between"),
        (lambda data: data + b"\0", "or behind them"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage, message):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2, 4), "b": torch.ones(2)}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"model.safetensors'.*({message})"):
        sb.Checkpoint.scan(tmp_path)


def test_no_files_pickles_and_twins(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no safetensors files in .*pickle \(.bin, .pt\) is not read"):
        sb.Checkpoint.scan(tmp_path)
    for name in "ab":
        save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors' holds the tensor 'w', which another file holds too"):
        sb.Checkpoint.scan(tmp_path)


@pytest.mark.parametrize("field", ["repo", "revision", "files", "weights"])
def test_fields_of_other_types(folder, field):
    with pytest.raises(ValueError, match="a checkpoint is a repo, a revision, files with sha256 and size"):
        sb.Checkpoint(**{**vars(sb.Checkpoint.scan(folder)), field: {"a": 1}})


def test_on_the_command_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["skillbank", "base", str(folder), "gpt2", "--bank", str(tmp_path / "bank")])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert capsys.readouterr().out.startswith("gpt2@1")
    assert sb.Bank(tmp_path / "bank").get("gpt2").revision == "ab" * 20
