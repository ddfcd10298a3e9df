"""PEFT's folders in, PEFT's folders and plain weights out."""

import json
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

import skillbank as sb
from skillbank import cli
from skillbank.bank import UnknownRef
from skillbank.bank.records import read_payload
from skillbank.load import build_base
from skillbank.recipe import merge_versions
from tests.tiny import random_skill, tiny_batch, tiny_policy

CONF = {"_target_": "skillbank.models.diffusion.DiffusionPolicy", "observation_dim": 5, "action_dim": 3}


@pytest.fixture
def bank(tmp_path):
    bank = sb.Bank(tmp_path / "bank")
    policy = tiny_policy()
    conf = {**CONF, "width": 16, "blocks": 2, "time_dim": 8, "time_hidden": [8, 8]}
    bank.put(sb.Base(conf, policy.state_dict()), "base")
    for name, seed in (("one", 1), ("two", 2)):
        bank.put(random_skill(policy.net, seed=seed), name, card={"base": "base"})
    bank.put(sb.Composition("base", ("one", "two"), merge={"method": "stack", "weights": [0.5, -1.0]}), "merged")
    gate = {"_target_": "skillbank.gate.ConstantGate", "context_dim": 5, "skills": 2}
    bank.put(sb.Composition("base", ("one", "two"), gate=gate, tensors={"weights": torch.ones(2)}), "gated")
    return bank


def noise_of(net):
    torch.manual_seed(3)
    return net(torch.randn(4, 3), torch.randn(4, 5), torch.arange(4))


@pytest.mark.parametrize("ref", ["one", "merged"])
def test_an_exported_adapter_loads_into_peft_and_comes_back(bank, tmp_path, ref):
    folder = sb.export(ref, tmp_path / "out", bank)
    theirs = PeftModel.from_pretrained(build_base(bank.get("base")).net, folder)
    assert_close(noise_of(theirs), noise_of(sb.load(ref, bank).net))
    back = sb.import_adapter(folder, bank, "back", base="base", card={"tags": ["peft"]})
    assert_close(noise_of(sb.load(str(back), bank).net), noise_of(sb.load(ref, bank).net))
    card = bank.card(back)
    assert (card.base["ref"], card.tags) == ("base@1", ("peft",))
    assert bank.verify() == []


@pytest.mark.parametrize("ref", ["base", "two", "merged"])
def test_exported_weights_compute_the_same_without_an_adapter(bank, tmp_path, ref):
    sb.export(ref, tmp_path / "out", bank, merged=True)
    plain = build_base(read_payload("base", tmp_path / "out")).eval()
    assert_close(noise_of(plain.net), noise_of(sb.load(ref, bank).net))
    sb.check_model(plain, tiny_batch())


def test_an_adapter_made_by_peft_is_imported_with_its_scale(tmp_path):
    torch.manual_seed(0)
    plain = nn.ModuleDict({"a": nn.Linear(6, 4)})
    peft = get_peft_model(plain, LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=["a"], init_lora_weights=False))
    peft.peft_config["default"].base_model_name_or_path = "org/base"
    peft.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    bank = sb.Bank(tmp_path / "bank")
    ref = sb.import_adapter(tmp_path / "peft", bank, "foreign")
    layer = peft.base_model.model["a"]
    assert_close(bank.get(ref).delta("a"), layer.get_delta_weight("default"))
    assert bank.card(ref).base == {"ref": None, "hash": None, "name": "org/base", "fingerprint": None}
    config = json.loads((sb.export("foreign", tmp_path / "out", bank) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"


def test_a_merge_says_of_the_base_what_its_skills_say(tmp_path, monkeypatch, capsys):
    bank = sb.Bank(tmp_path / "bank")
    told = {"base_model_name_or_path": "gpt2", "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    for number in range(2):
        torch.manual_seed(number)
        skill = sb.Skill({"a": (torch.randn(2, 6), torch.randn(4, 2))})
        sb.write_adapter(skill, tmp_path / f"{number}", base_name="gpt2", fan_in_fan_out=True, task_type="CAUSAL_LM" if number else None)
        sb.import_adapter(tmp_path / f"{number}", bank, f"s{number}")
    arguments = ["merge", "s0", "s1", "--weights", "1,2", "-o", "m", "--bank", str(bank.root)]
    monkeypatch.setattr(sys, "argv", ["skillbank", *arguments])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert capsys.readouterr().out.endswith("m@1\n")
    config = json.loads((sb.export("m", tmp_path / "out", bank) / "adapter_config.json").read_text())
    assert {key: config[key] for key in told} == told
    assert sb.rebuild("m", bank).equal


@pytest.mark.parametrize(
    "weights", [[np.float32(0.5), np.int64(2)], np.array([0.5, 2.0]), torch.tensor([0.5, 2.0]), (torch.tensor(0.5), torch.tensor([2.0]))]
)
def test_weights_of_numpy_and_torch_are_stored_as_numbers(bank, weights):
    skill, card, adapter = merge_versions(["one", "two"], bank, weights=weights)
    ref = bank.put(skill, "sum", card=card, adapter=adapter)
    assert (bank.card(ref).conf["merge"]["weights"], [each["weight"] for each in bank.card(ref).parents]) == ([0.5, 2], [0.5, 2])
    assert sb.rebuild(ref, bank).equal
    ref = bank.put(sb.Composition("base", ("one", "two"), merge={"method": "stack", "weights": weights}), "both")
    assert (bank.get(ref).weights, [each["weight"] for each in bank.card(ref).parents]) == ([0.5, 2], [0.5, 2])
    skill, card, _ = merge_versions(["one", "two"], bank, weights=[{"*": np.float32(0.5)}, 1])
    bank.put(skill, "patterns", card=card)
    assert bank.card("patterns").conf["merge"]["weights"] == [{"*": 0.5}, 1]


@pytest.mark.parametrize(
    ("ref", "merged", "error", "message"),
    [
        ("base", False, ValueError, "'base' is a base, no adapter: export it with merged=True"),
        ("gated", False, ValueError, "'gated' has a gate, whose weights depend on the input"),
        ("gated", True, ValueError, "'gated' has a gate, whose weights depend on the input"),
        ("none", False, UnknownRef, "no 'none' in"),
    ],
)
def test_what_cannot_be_exported_leaves_nothing(bank, tmp_path, ref, merged, error, message):
    with pytest.raises(ValueError, match="weights='there' are a base's, and an adapter holds none"):
        sb.export("one", tmp_path / "out", bank, weights="there")
    with pytest.raises(error, match=message):
        sb.export(ref, tmp_path / "out", bank, merged=merged)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(bank, tmp_path):
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="holds something already: export to another folder"):
            sb.export("one", target, bank)


def test_on_the_command_line(bank, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["skillbank", *map(str, arguments), "--bank", str(bank.root)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr()
        return stop.value.code, out.out, out.err

    assert run("export", "merged", tmp_path / "out")[:2] == (0, f"{tmp_path / 'out'}\n")
    assert run("import", tmp_path / "out", "again", "--base", "base", "--tag", "x")[:2] == (0, "again@1\n")
    code, _, err = run("export", "one", tmp_path / "out")
    assert (code, "holds something already" in err) == (1, True)
    torch.manual_seed(0)
    plain = nn.ModuleDict({"a": nn.Linear(6, 4)})
    get_peft_model(plain, LoraConfig(r=4, lora_alpha=4, use_rslora=True, target_modules=["a"])).save_pretrained(
        tmp_path / "rs", save_embedding_layers=False
    )
    code, out, err = run("import", tmp_path / "rs", "rs", "--scale", "0.5")
    assert (code, out) == (0, "rs@1\n")
    assert err.startswith("skillbank: use_rslora with lora_alpha = r = 4: if it was made by add_weighted_adapter, every delta is sqrt(4) = 2 times")
    assert err.endswith("or import it with --scale 0.5\n")
    code, _, err = run("import", tmp_path / "nowhere", "again")
    assert (code, err.startswith("skillbank: no adapter folder at")) == (1, True)
