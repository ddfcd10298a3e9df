"""LoRA checkpoints of other libraries, against what those libraries compute and against dense sums in float64, and every refusal by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import skillbank as sb
from skillbank.formats import read_lora

GOLDEN = Path(__file__).parent / "golden" / "formats"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 3


def patch(folder, part=None, **changes):
    path = next(path for path in sorted(folder.glob("*.json")) if path.name in ("adapter_config.json", "mttl_config.json"))
    config = json.loads(path.read_text())
    (config[part] if part else config).update(changes)
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture
def adapters(tmp_path):
    return Path(shutil.copytree(GOLDEN / "adapters-bert", tmp_path / "adapters"))


@pytest.fixture
def mttl(tmp_path):
    """What resaving a mttl expert gives: its weights, and its two configurations."""
    folder = tmp_path / "mttl"
    folder.mkdir()
    tensors = {}
    for i, (module, into, out) in enumerate([("layers.0.q_proj", 6, 4), ("layers.0.up_proj", 4, 9)]):
        tensors |= {f"{module}.lora_a": random(into, 3, seed=i), f"{module}.lora_b": random(3, out, seed=9 + i)}
    save_file(tensors, folder / "mttl_weights.safetensors")
    modifier = {"class_name": "mttl.models.modifiers.lora.LoRAConfig", "modify_modules": ".*", "modify_layers": "q_proj|up_proj", "tie_params": None}
    modifier |= {"lora_rank": 3, "lora_alpha": 16.0, "lora_dropout": 0.05, "lora_init_b_random": False}
    (folder / "mttl_config.json").write_text(json.dumps({"base_model": "org/base", "modifier_config": modifier}))
    return folder


@pytest.mark.parametrize("name", ["adapters-bert", "adapters-gpt2", "adapters-gpt2-one"])
def test_adapters_checkpoints_compute_what_adapters_computes(name):
    found = read_lora(GOLDEN / name)
    theirs = load_file(GOLDEN / name / "deltas.safetensors")
    assert {f"{module}.weight" for module in found.skill} == set(theirs)
    for module in found.skill:
        delta = found.skill.delta(module)
        assert_close(delta.mT if found.options["fan_in_fan_out"] else delta, theirs[f"{module}.weight"])
    assert (found.format, found.lints) == ("adapters", ())


def test_adapters_scale_is_alpha_over_r(adapters):
    tensors = load_file(adapters / "adapter.safetensors")
    for module, (a, b) in read_lora(adapters).skill.factors.items():
        raw_a, raw_b = (tensors[f"{module}.loras.mine.lora_{letter}"].double() for letter in "AB")
        assert_close(b.double() @ a.double(), raw_b @ raw_a * 7 / 3, rtol=0, atol=1e-6)


def test_adapters_before_1_1_trained_without_the_scale(adapters):
    tensors = load_file(adapters / "adapter.safetensors")
    found = read_lora(patch(adapters, version="adapters.1.0.1"))
    for module, (a, b) in found.skill.factors.items():
        assert_close(b @ a, tensors[f"{module}.loras.mine.lora_B"] @ tensors[f"{module}.loras.mine.lora_A"])
    assert [lint.versions for lint in found.lints] == ["adapters before 1.1.0"]
    assert "alpha = 7 was not applied in training" in str(found.lints[0])


def test_a_fused_layer_of_old_adapters_keeps_its_scale(tmp_path):
    folder = patch(Path(shutil.copytree(GOLDEN / "adapters-gpt2", tmp_path / "old")), version="adapters.1.0.1")
    now, old = read_lora(GOLDEN / "adapters-gpt2").skill, read_lora(folder).skill
    assert_close(old.delta("transformer.h.0.attn.c_attn"), now.delta("transformer.h.0.attn.c_attn"))
    assert_close(old.delta("transformer.h.0.mlp.c_proj") * 5 / 2, now.delta("transformer.h.0.mlp.c_proj"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_gating": True}, "use_gating=True: a gate weights"),
        ({"use_dora": True}, "use_dora=True: DoRA"),
        ({"vera_b": 0.0}, r"vera_b=0.0: VeRA"),
        ({"composition_mode": "scale"}, r"composition_mode='scale' is \(IA\)\^3"),
        ({"architecture": "union"}, "architecture='union' is not LoRA alone"),
        ({"architecture": "mtl_lora"}, "architecture='mtl_lora' is not LoRA alone"),
        ({"bias": "all"}, "bias='all' is unknown and may change"),
        ({"r": 2}, "module 'bert.encoder.layer.0.attention.self.query': .* says r=2"),
        ({"alpha": None}, "alpha=None must be a number"),
        ({"r": 0}, "r=0 must be at least 1"),
    ],
)
def test_adapters_configurations_that_are_refused(adapters, change, message):
    with pytest.raises(ValueError, match=f"adapter '{adapters}': {message}"):
        read_lora(patch(adapters, "config", **change))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("bert.x.loras.mine.gate.weight", "tensor 'bert.x.loras.mine.gate.weight' is no LoRA factor"),
        ("bert.x.loras.mine.m.weight", "tensor 'bert.x.loras.mine.m.weight' is no LoRA factor"),
        ("bert.x.loras.mine.lora_B", "module 'bert.x' has one factor of two"),
    ],
)
def test_adapters_tensors_that_are_refused(adapters, key, message):
    save_file({**load_file(adapters / "adapter.safetensors"), key: torch.ones(3, 3)}, adapters / "adapter.safetensors")
    with pytest.raises(ValueError, match=message):
        read_lora(adapters)


def test_an_adapters_checkpoint_with_a_head_is_refused(adapters):
    (adapters / "head_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"head_config.json: it carries a prediction head"):
        read_lora(adapters)


def test_mttl_experts_are_read(mttl):
    found = read_lora(mttl)
    assert (found.format, found.base_name, list(found.skill)) == ("mttl", "org/base", ["layers.0.q_proj", "layers.0.up_proj"])
    tensors = load_file(mttl / "mttl_weights.safetensors")
    for module, (a, b) in found.skill.factors.items():
        dense = (tensors[f"{module}.lora_a"].double() @ tensors[f"{module}.lora_b"].double()).mT * 16 / 3
        assert_close(b.double() @ a.double(), dense, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_name": "mttl.models.modifiers.lora.SkilledLoRAConfig"}, "modifier_config is of 'SkilledLoRAConfig'"),
        ({"__model_modifier__": "ia3"}, "modifier_config is of 'ia3'"),
        ({"n_skills": 4}, "n_skills=4 is unknown"),
        ({"lora_rank": 6}, r"module 'layers.0.q_proj': .* lora_rank=6, but lora_a is \(6, 3\)"),
        ({"lora_alpha": "16"}, "lora_alpha='16' must be a number"),
    ],
)
def test_mttl_configurations_that_are_refused(mttl, change, message):
    with pytest.raises(ValueError, match=f"adapter '{mttl}': {message}"):
        read_lora(patch(mttl, "modifier_config", **change))


def test_mttl_files_that_do_not_do(mttl):
    tensors = load_file(mttl / "mttl_weights.safetensors")
    save_file({key: value[None, None] for key, value in tensors.items()}, mttl / "mttl_weights.safetensors")
    with pytest.raises(ValueError, match=r"lora_a \(1, 1, 6, 3\) holds several skills"):
        read_lora(mttl)
    (mttl / "mttl_weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no mttl_weights.safetensors"):
        read_lora(mttl)
    save_file(tensors, mttl / "mttl_weights.safetensors")
    (mttl / "mttl_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"mttl_config.json has no modifier_config"):
        read_lora(mttl)
    (mttl / "mttl_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"mttl_config.json is not a JSON object"):
        read_lora(mttl)
    (mttl / "mttl_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no mttl_config.json"):
        read_lora(mttl)


def test_pickles_are_refused_with_the_way_out(adapters, mttl, tmp_path):
    (adapters / "adapter.safetensors").rename(adapters / "pytorch_adapter.bin")
    with pytest.raises(ValueError, match=r"stored as pickle \(pytorch_adapter.bin\).*use_safetensors=True"):
        read_lora(adapters)
    (mttl / "mttl_weights.safetensors").rename(mttl / "mttl_weights.bin")
    with pytest.raises(ValueError, match=r"stored as pickle \(mttl_weights.bin\).*expert.expert_weights.*mttl_weights.safetensors"):
        read_lora(mttl)
    (tmp_path / "expert.ckpt").write_bytes(b"")
    for place in (tmp_path, tmp_path / "expert.ckpt"):
        with pytest.raises(ValueError, match=r"stored as pickle \(expert.ckpt\)"):
            read_lora(place)


def test_they_are_imported(adapters, mttl, tmp_path):
    bank = sb.Bank(tmp_path / "bank")
    one, two = sb.import_adapter(adapters, bank, "bert"), sb.import_adapter(mttl, bank, "expert", card={"conf": {"mine": 1}})
    assert_close(bank.get(one).delta("bert.encoder.layer.0.output.dense"), read_lora(adapters).skill.delta("bert.encoder.layer.0.output.dense"))
    card = bank.card(two)
    assert (card.base["name"], card.conf["mine"]) == ("org/base", 1)
    assert card.conf["import"] == {"format": "mttl", "scale": 1.0, "lints": []}
    assert "mttl adapter 'mttl'" in card.notes
    with pytest.raises(ValueError, match="scale=nan must be finite"):
        sb.import_adapter(mttl, bank, "expert", scale=float("nan"))


def peft_merge(folder, kind, weights, **options):
    """A merge by PEFT, saved; its delta as it was meant, in float64."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["0"], init_lora_weights=False, **options)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 10)), config, "one")
    names = ["one", "two"][: len(weights)]
    for name in names[1:]:
        model.add_adapter(name, config)
    layer = model.base_model.model[0]
    model.add_weighted_adapter(names, weights, "merge", combination_type=kind, svd_rank=2 * len(names) if kind == "svd" else None)
    model.save_pretrained(folder, selected_adapters=["merge"], save_embedding_layers=False)
    meant = torch.zeros(10, 12, dtype=torch.float64)
    for name, weight in zip(names, weights, strict=True):
        a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
        meant += weight * layer.scaling[name] * (b @ a)
    return folder / "merge", meant.detach()


@pytest.mark.parametrize(("kind", "weights"), [("cat", [0.75, -0.5]), ("svd", [0.75, -0.5]), ("linear", [0.75])])
def test_peft_merges_with_rslora_are_named_with_the_factor(tmp_path, kind, weights):
    folder, meant = peft_merge(tmp_path / "peft", kind, weights, use_rslora=True)
    (lint,) = read_lora(folder).lints
    rank = 4 if len(weights) == 2 else 2
    assert lint.factor == pytest.approx(rank**0.5)
    assert_close(read_lora(folder).skill.delta("0").double(), meant * lint.factor, rtol=0, atol=1e-5)
    assert str(lint).startswith(f"use_rslora with lora_alpha = r = {rank}: if it was made by add_weighted_adapter, every delta is sqrt({rank})")
    bank = sb.Bank(tmp_path / "bank")
    ref = sb.import_adapter(folder, bank, "merge", scale=1 / lint.factor)
    assert_close(bank.get(ref).delta("0").double(), meant, rtol=0, atol=1e-5)
    assert bank.card(ref).conf["import"]["lints"][0]["factor"] == lint.factor


def test_peft_merges_by_svd_counted_the_scale_twice():
    folder = GOLDEN / "peft-svd"
    found = read_lora(folder)
    assert_close(found.skill.delta("0"), 4 * load_file(folder / "deltas.safetensors")["0.weight"])
    (lint,) = found.lints
    assert (lint.factor, lint.versions) == (None, "PEFT 0.9 to 0.20")
    assert "4 times too much for lora_alpha = 4 r" in str(lint)


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_merges_that_are_right_are_not_named(tmp_path, kind):
    folder, meant = peft_merge(tmp_path, kind, [0.75, -0.5] if kind != "linear" else [0.75])
    found = read_lora(folder)
    assert_close(found.skill.delta("0").double(), meant, rtol=0, atol=1e-5)
    assert found.lints == ()


@pytest.mark.parametrize(
    ("changes", "lints"),
    [
        ({"peft_version": None}, 2),
        ({"peft_version": "0.20.1.dev0"}, 2),
        ({"peft_version": "0.21.0"}, 1),
        ({"peft_version": "0.22.0"}, 0),
        ({"use_rslora": False}, 0),
        ({"lora_alpha": 8}, 0),
        ({"alpha_pattern": {"0": 4}}, 0),
    ],
)
def test_which_files_are_named(tmp_path, changes, lints):
    folder, _ = peft_merge(tmp_path, "svd", [0.75, -0.5], use_rslora=True)
    assert len(read_lora(patch(folder, **changes)).lints) == lints
