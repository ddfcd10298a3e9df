"""Whole Hugging Face folders with a skill folded in, against the model with the adapter on it."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from skillbank import Bank, Checkpoint, Composition, Skill, attach, detach, export, merge, shards
from skillbank.shards import fold_checkpoint
from tests.tiny import close


def llama(tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=20, bos_token_id=0, eos_token_id=0)).eval()


def skill_on(net, modules, rank=2):
    """A skill on the modules whose path matches."""
    generator, factors, embeddings = torch.Generator().manual_seed(1), {}, set()
    for name, layer in net.named_modules():
        if re.fullmatch(modules, name) and hasattr(layer, "weight"):
            out, inner = layer.weight.shape
            if isinstance(layer, torch.nn.Embedding) or "Conv1D" in type(layer).__name__:
                out, inner = inner, out
            if isinstance(layer, torch.nn.Embedding):
                embeddings.add(name)
            factors[name] = (torch.randn(rank, inner, generator=generator) / 4, torch.randn(out, rank, generator=generator) / 4)
    return Skill(factors, frozenset(embeddings))


def outputs(net):
    with torch.no_grad():
        return net(torch.arange(12).reshape(2, 6)).logits


CASES = {
    "projections": (llama, r".*\.(q|v|down)_proj"),
    "conv1d, also square ones": (gpt2, r".*\.(c_attn|c_proj|c_fc)"),
    "head of an untied model": (llama, r"lm_head|model\.embed_tokens"),
    "head of a tied model": (lambda: llama(tied=True), "lm_head"),
    "embedding of a tied model": (lambda: llama(tied=True), r"model\.embed_tokens|.*\.q_proj"),
    "both of a tied model": (lambda: llama(tied=True), r"lm_head|model\.embed_tokens"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", ["5GB", "10KB"])
def test_the_folder_computes_what_the_adapter_does(case, size, tmp_path):
    make, modules = CASES[case]
    net = make()
    net.save_pretrained(tmp_path / "base", max_shard_size=size)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    skill = skill_on(net, modules)
    fold_checkpoint(tmp_path / "base", skill, tmp_path / "out")
    attach(net, skill)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    close(outputs(written), outputs(net))
    detach(net)
    assert not torch.allclose(outputs(written), outputs(net), atol=1e-3)
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    shards_there = len(list((tmp_path / "base").glob("*.safetensors")))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == shards_there
    assert (shards_there > 1) == (size == "10KB")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_sums_are_rounded_once(tmp_path):
    net = llama().to(torch.bfloat16)
    net.save_pretrained(tmp_path / "base")
    skill = skill_on(net, r".*\.q_proj").to(dtype=torch.bfloat16)
    fold_checkpoint(tmp_path / "base", skill, tmp_path / "out")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, (a, b) in skill.factors.items():
        exact = net.get_submodule(name).weight.float() + b.float() @ a.float()
        assert torch.equal(written.get_submodule(name).weight, exact.to(torch.bfloat16))


def test_through_the_bank(tmp_path):
    net = llama()
    net.save_pretrained(tmp_path / "base")
    bank, skill = Bank(tmp_path / "bank"), skill_on(net, r".*\.q_proj")
    bank.put(Checkpoint.scan(tmp_path / "base"), "llama")
    bank.put(skill, "skill", card={"base": "llama"})
    export("skill", tmp_path / "out", bank, merged=True)
    attach(net, skill)
    close(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), outputs(net))
    other = skill_on(net, r".*\.(q|v)_proj", rank=3)
    detach(net)
    bank.put(other, "other", card={"base": "llama"})
    bank.put(Composition("llama", ("skill", "other"), merge={"method": "ties", "weights": [0.5, 0.7]}), "blend")
    export("blend", tmp_path / "blend", bank, merged=True)
    attach(net, merge([skill, other], [0.5, 0.7], method="ties"))
    close(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "blend")), outputs(net))
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"are not at .*base'.*--weights"):
        export("skill", tmp_path / "again", bank, merged=True)
    export("skill", tmp_path / "again", bank, merged=True, weights=tmp_path / "moved")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    detach(net)
    with torch.no_grad():
        net.lm_head.weight[0, 0] += 1
    net.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"does not hold the base that the skill was put with: model\.safetensors is another"):
        export("skill", tmp_path / "third", bank, merged=True, weights=tmp_path / "other")
    with pytest.raises(ValueError, match="'llama' is a checkpoint as it lies in"):
        export("llama", tmp_path / "third", bank, merged=True)


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    net = llama()
    net.save_pretrained(tmp_path / "base", max_shard_size="10KB")
    written = []

    def stop(path, *rest):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        return save(path, *rest)

    save = shards.save_tensors
    monkeypatch.setattr(shards, "save_tensors", stop)
    with pytest.raises(KeyboardInterrupt):
        fold_checkpoint(tmp_path / "base", skill_on(net, r".*\.q_proj"), tmp_path / "out")
    assert len(written) == 3
    assert os.listdir(tmp_path) == ["base"]


def test_what_does_not_fit_is_refused(tmp_path):
    net = llama()
    net.save_pretrained(tmp_path / "base")
    skill = skill_on(net, r".*\.q_proj")
    with pytest.raises(ValueError, match=r"the net has no module 'model\.layers\.7\.self_attn\.q_proj'"):
        fold_checkpoint(tmp_path / "base", Skill({"model.layers.7.self_attn.q_proj": skill["model.layers.0.self_attn.q_proj"]}), tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    with pytest.raises(FileExistsError, match="holds something already"):
        fold_checkpoint(tmp_path / "base", skill, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no safetensors files"):
        fold_checkpoint(tmp_path / "empty", skill, tmp_path / "new")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "architectures": ["LlamaForFortuneTelling"]}))
    with pytest.raises(ValueError, match="has no 'LlamaForFortuneTelling'"):
        fold_checkpoint(tmp_path / "base", skill, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_same_weights_in_other_files_are_left_alone(tmp_path):
    net = llama()
    net.save_pretrained(tmp_path / "base")
    (tmp_path / "base/consolidated.safetensors").write_bytes((tmp_path / "base/model.safetensors").read_bytes())
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", ".hidden"):
        (tmp_path / "base" / name).write_text("{}")
    fold_checkpoint(tmp_path / "base", skill_on(net, r".*\.q_proj"), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    net.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    next((tmp_path / "sharded").glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="of the index is missing"):
        fold_checkpoint(tmp_path / "sharded", skill_on(net, r".*\.q_proj"), tmp_path / "again")


def test_a_tie_that_is_stored_twice_is_cut_as_well(tmp_path):
    net = llama(tied=True)
    net.save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "base/model.safetensors", {"format": "pt"})
    skill = skill_on(net, "lm_head")
    fold_checkpoint(tmp_path / "base", skill, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    attach(net, skill)
    close(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), outputs(net))
