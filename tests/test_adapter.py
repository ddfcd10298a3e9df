"""PEFT's format in both directions, with PEFT itself as the oracle, and every refusal by name."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from skillbank.adapter import CONFIG_FILE, WEIGHTS_FILE, read_adapter, write_adapter
from skillbank.skill import Skill


class Tower(nn.Module):
    """Every layer type; `net.0` is the end of the name `other.net.0`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(11, 6)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))
        self.other = nn.ModuleDict({"net": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))})
        self.turned = Conv1D(4, 8)
        self.line = nn.Conv1d(4, 6, 3, padding=1, stride=2)
        self.image = nn.Conv2d(3, 5, (3, 2), padding=1)

    def forward(self, ids):
        x = self.other.net(self.net(self.table(ids)))
        y = self.line(self.turned(x).mT)
        return self.image(y.reshape(len(ids), 3, 2, -1))


SIZES = {
    "table": ((11,), 6),
    "net.0": ((6,), 8),
    "other.net.0": ((8,), 8),
    "other.net.1": ((8,), 8),
    "turned": ((8,), 4),
    "line": ((4, 3), 6),
    "image": ((3, 3, 2), 5),
}
IDS = torch.arange(20).reshape(2, 10) % 11


def tower_skill(modules=tuple(SIZES), dtype=torch.float32):
    torch.manual_seed(5)
    factors = {}
    for rank, name in enumerate(modules, start=1):
        into, out = SIZES[name]
        factors[name] = ((torch.randn(rank, *into) / 3).to(dtype), (torch.randn(out, rank) / 3).to(dtype))
    return Skill(factors, frozenset({"table"} & set(modules)))


def dense(skill):
    """The tower with the deltas added to its weights: an independent reference."""
    tower = Tower()
    with torch.no_grad():
        for name in skill:
            layer, delta = tower.get_submodule(name), skill.delta(name)
            layer.weight += delta.mT if name in skill.embeddings or isinstance(layer, Conv1D) else delta
    return tower


def peft_adapter(folder, tower=None, randomise=True, **options):
    options = {"r": 4, "lora_alpha": 6, "target_modules": list(SIZES), "fan_in_fan_out": False, **options}
    model = get_peft_model(tower or Tower(), LoraConfig(**options))
    if randomise:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"net.0": 2, "image": 3}, "alpha_pattern": {"^other\\.net\\.0": 5, "line": 1, "(net.0|turned)": 7}},
        {"use_rslora": True, "alpha_pattern": {"^net.0": 1.5}, "rank_pattern": {".*net.*": 5, "net.1": 2}},
        {"target_modules": ["net.0"], "init_lora_weights": "gaussian", "lora_dropout": 0.1},
        {"target_modules": ["other.net.0"], "init_lora_weights": "orthogonal"},
        {"target_modules": ["other.net.1"], "init_lora_weights": "mica"},
    ],
    ids=["plain", "rslora", "patterns", "both", "suffix", "orthogonal", "mica"],
)
def test_reads_what_peft_writes(tmp_path, options):
    peft_adapter(tmp_path, **options)
    model = PeftModel.from_pretrained(Tower(), tmp_path)  # PEFT saves patterns sorted, so where two fit one module the live model may differ
    assert_close(dense(read_adapter(tmp_path))(IDS), model(IDS))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize("modules", [tuple(SIZES), ("net.0",), ("other.net.0", "other.net.1"), ("net.0", "table", "image")])
def test_peft_reads_what_we_write(tmp_path, modules):
    skill = tower_skill(modules)
    write_adapter(skill, tmp_path)
    model = PeftModel.from_pretrained(Tower(), tmp_path)
    assert {name.removeprefix("base_model.model.") for name, layer in model.named_modules() if hasattr(layer, "lora_A")} == set(modules)
    assert_close(model(IDS), dense(skill)(IDS))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_gpt2(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=31, n_positions=16, bos_token_id=0, eos_token_id=0)).eval()

    options = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM", "rank_pattern": {"h.0.attn.c_attn": 2}}
    theirs = peft_adapter(tmp_path / "theirs", gpt2(), **options)
    skill = read_adapter(tmp_path / "theirs")
    write_adapter(skill, tmp_path / "ours", base_name="gpt2", fan_in_fan_out=True, task_type="CAUSAL_LM")
    config = json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("gpt2", "CAUSAL_LM")
    assert config["target_modules"] == list(skill)
    ours = PeftModel.from_pretrained(gpt2(), tmp_path / "ours")
    ids = torch.arange(12).reshape(2, 6)
    assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_read_inverts_write_bit_for_bit(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        skill = tower_skill(dtype=dtype)
        write_adapter(skill, tmp_path / str(dtype))
        back = read_adapter(tmp_path / str(dtype))
        assert back.fingerprint == skill.fingerprint
        assert back.embeddings == skill.embeddings


def test_same_skill_same_bytes(tmp_path):
    skill = tower_skill()
    shared = Skill(
        {name: (a.mT.contiguous().mT if a.dim() == 2 else a, b.mT.contiguous().mT) for name, (a, b) in reversed(skill.factors.items())},
        skill.embeddings,
    )
    write_adapter(skill, tmp_path / "a")
    write_adapter(shared, tmp_path / "b")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_shared_memory_is_written(tmp_path):
    both = torch.randn(4, 4)
    skill = Skill({"net.0": (both[:2], both[:, 2:]), "net.1": (both[:2], both[:, 2:])})
    write_adapter(skill, tmp_path)
    assert read_adapter(tmp_path).fingerprint == skill.fingerprint


def test_scale_is_folded_without_rounding(tmp_path):
    write_adapter(tower_skill(("net.0", "other.net.0"), torch.bfloat16), tmp_path)
    a, b = read_adapter(tmp_path)["other.net.0"]
    patch(tmp_path, lora_alpha=4, alpha_pattern={})
    assert read_adapter(tmp_path)["other.net.0"][1].dtype == torch.bfloat16
    patch(tmp_path, lora_alpha=3)
    folded = read_adapter(tmp_path)["other.net.0"]
    assert folded[0].dtype == folded[1].dtype == torch.float32
    assert_close(folded[1] @ folded[0], b.float() @ a.float() * 1.5)


def test_folder_in_use_is_refused(tmp_path):
    write_adapter(tower_skill(), tmp_path)
    with pytest.raises(FileExistsError, match=r"adapter_config.json' exists"):
        write_adapter(tower_skill(), tmp_path)


def patch(folder, **changes):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True: DoRA"),
        ({"bias": "lora_only"}, "bias='lora_only' trains biases"),
        ({"lora_bias": True}, "lora_bias=True: it trains a bias"),
        ({"kasa_config": {"beta": 1}}, "kasa_config=.*: KaSA cuts"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens=.*aLoRA"),
        ({"use_qalora": True}, "use_qalora=True: QALoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora=.*BD-LoRA"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config=.*Arrow"),
        ({"monteclora_config": {"num_samples": 2}}, "monteclora_config=.*MonteCLoRA"),
        ({"modules_to_save": ["head"]}, r"modules_to_save=\['head'\]"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\]"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication=\[\[0, 2\]\]"),
        ({"target_parameters": ["w"]}, r"target_parameters=\['w'\]"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga'"),
        ({"use_everything": 1}, "use_everything=1 is unknown"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not LoRA"),
        ({"r": 5}, "module 'net.0'.*says rank 5"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern key '\(' is no regular expression"),
        ({"rank_pattern": [1]}, r"rank_pattern=\[1\] must map"),
        ({"lora_alpha": "x"}, "alpha_pattern gives 'x' for module 'net.0'"),
        ({"lora_alpha": 10**400}, "alpha_pattern gives 1000+ for module 'net.0'"),
        ({"lora_alpha": 1e999}, "alpha_pattern gives inf for module 'net.0'"),
        ({"rank_pattern": {"(n+)+x": 2}}, r"rank_pattern key '\(n\+\)\+x' may take for ever to match"),
        ({"rank_pattern": {"(n|ne)*x": 2}}, "may take for ever to match"),
        ({"rank_pattern": {"n?" * 40 + "x": 2}}, "may take for ever to match"),
        ({"rank_pattern": {"(n|n)" * 40 + "x": 2}}, "may take for ever to match"),
        ({"rank_pattern": {".*" * 300 + "x": 2}}, "may take for ever to match"),
        ({"rank_pattern": {"(.)\\1+x": 2}}, "may take for ever to match"),
        ({"rank_pattern": {"n{99999999999}": 2}}, "is no regular expression"),
    ],
)
def test_configs_that_are_refused(tmp_path, change, message):
    write_adapter(tower_skill(("net.0",)), tmp_path)
    patch(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    "pattern",
    [
        r"^net\.0",
        r".*\.net\.0|net\.\d+",
        r"(model\.)?(layers|net)\.[0-9]+",
        "(" + "layer|" * 40 + r"net)\.0",
        r"n.*t\.\d{1,3}",
    ],
)
def test_patterns_that_are_read(tmp_path, pattern):
    write_adapter(tower_skill(("net.0",)), tmp_path)
    patch(tmp_path, r=7, rank_pattern={pattern: tower_skill(("net.0",)).ranks["net.0"]})
    assert list(read_adapter(tmp_path)) == ["net.0"]


P = "base_model.model."


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({P + "net.0.lora_magnitude_vector": (8,)}, "lora_magnitude_vector' .*use_dora"),
        ({P + "net.0.lora_B.bias": (8,)}, "lora_B.bias' .*lora_bias"),
        ({P + "net.0.lora_diag": (1,)}, "lora_diag' .*kasa_config"),
        ({P + "head.modules_to_save.weight": (8, 8)}, "'base_model.model.head.modules_to_save.weight'"),
        ({P + "table.token_adapter.trainable_tokens_delta": (8, 8)}, "trainable_token_indices"),
        ({P + "table.base_layer.weight": (11, 6)}, "save_embedding_layers=False"),
        ({P + "net.0.weight": (8, 6)}, "'base_model.model.net.0.weight' fits no LoRA factor"),
        ({P + "net.0.lora_A.default.weight": (1, 6)}, "'base_model.model.net.0.lora_A.default.weight' fits no LoRA factor"),
        ({P + "net.9.lora_A.weight": (1, 6)}, "module 'net.9' has lora_A but no lora_B"),
        ({"net.0.lora_A.weight": (1, 6)}, "module 'net.0' has two factors"),
        ({P + "net.0.lora_embedding_A": (1, 6)}, "module 'net.0' has two factors"),
        ({P + "c.lora_A.weight": (2, 4, 3), P + "c.lora_B.weight": (8, 1, 1)}, "module 'c' is a grouped convolution"),
        ({P + "c.lora_A.weight": (1, 4, 3), P + "c.lora_B.weight": (8, 1, 3)}, "module 'c': .* no factors of a convolution"),
    ],
)
def test_tensors_that_are_refused(tmp_path, extra, message):
    write_adapter(tower_skill(("net.0",)), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    save_file({**tensors, **{name: torch.ones(shape) for name, shape in extra.items()}}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path)


def test_what_dora_really_writes_is_refused(tmp_path):
    peft_adapter(tmp_path, target_modules=["net.0"], use_dora=True)
    with pytest.raises(ValueError, match="use_dora=True: DoRA"):
        read_adapter(tmp_path)
    patch(tmp_path, use_dora=False)
    with pytest.raises(ValueError, match="lora_magnitude_vector"):
        read_adapter(tmp_path)


def test_damaged_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no adapter folder at .*nowhere"):
        read_adapter(tmp_path / "nowhere")
    write_adapter(tower_skill(("net.0",)), tmp_path)
    good = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(good[:-3])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors"):
        read_adapter(tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model.safetensors"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"stored as pickle \(adapter_model.bin\)"):
        read_adapter(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(good)
    (tmp_path / CONFIG_FILE).write_text("[]")
    with pytest.raises(ValueError, match=r"adapter_config.json is not a JSON object"):
        read_adapter(tmp_path)


def test_nan_is_refused_with_the_folder_and_the_module(tmp_path):
    write_adapter(tower_skill(("net.0",)), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=rf"{tmp_path}.*'net.0' holds NaN"):
        read_adapter(tmp_path)
