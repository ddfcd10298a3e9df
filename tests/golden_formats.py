"""The small checkpoints in tests/golden/formats, as other tools wrote them, each with the deltas that the tool itself computes.

`python -m tests.golden_formats TOOL` writes those of one tool, which must be installed: adapters (1.3.0) or peft (0.20.0). They are kept because
these versions and the project's own requirements do not go into one environment.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "golden" / "formats"


def adapters_checkpoint(name, model, **options):
    """Save a LoRA with random factors, and what merging it adds to every weight."""
    from adapters import LoRAConfig

    model.add_adapter("mine", config=LoRAConfig(**options))
    for key, parameter in model.named_parameters():
        if ".loras.mine." in key:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_adapter(FOLDER / name, "mine", use_safetensors=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.merge_adapter("mine")
    deltas = {key: value - before[key] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    save_file({key: value.contiguous() for key, value in deltas.items()}, FOLDER / name / "deltas.safetensors")


def adapters():
    """Separate and fused query, key and value; gpt2 stores its weights as (in, out)."""
    from transformers import BertConfig, GPT2Config

    from adapters import BertAdapterModel, GPT2AdapterModel

    bert = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, vocab_size=20, max_position_embeddings=16)
    gpt2 = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=16)
    torch.manual_seed(0)
    adapters_checkpoint("adapters-bert", BertAdapterModel(bert), r=3, alpha=7, intermediate_lora=True, output_lora=True)
    adapters_checkpoint("adapters-gpt2", GPT2AdapterModel(gpt2), r=2, alpha=5, attn_matrices=["v", "q"], output_lora=True)
    adapters_checkpoint("adapters-gpt2-one", GPT2AdapterModel(gpt2), r=2, alpha=5, attn_matrices=["k"])


def peft():
    """A merge by SVD of two adapters of scale 4, which that version scales twice; beside it the sum that was meant."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 4)), config, "one")
    model.add_adapter("two", config)
    layer = model.base_model.model[0]
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.add_weighted_adapter(["one", "two"], [0.75, -0.5], "merge", combination_type="svd", svd_rank=4)
    model.save_pretrained(FOLDER, selected_adapters=["merge"], save_embedding_layers=False)
    (FOLDER / "merge").rename(FOLDER / "peft-svd")
    (FOLDER / "README.md").unlink()
    meant = 0.75 * layer.get_delta_weight("one") - 0.5 * layer.get_delta_weight("two")
    save_file({"0.weight": meant.detach().contiguous()}, FOLDER / "peft-svd" / "deltas.safetensors")


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    {"adapters": adapters, "peft": peft}[sys.argv[1]]()
