"""Skills of a language model: training, several skills in one batch, generation under a gate, and the search of a bank; ours beside PEFT.

python -m benchmarks.language                   on one and two threads; stored in benchmarks/results/language.jsonl
python -m benchmarks.language --quick           few rounds on one thread; stores nothing
python -m benchmarks.language --from-results    the stored tables

A Llama of 6 blocks, 256 wide (5.5 million parameters), from random weights, in float32; factors of rank 8 on all 42 linear layers of the blocks.
Training: batches of 16 rows of 64 tokens, loss, gradient and AdamW; "base" is its own loss and the gradient of its embeddings. Four in a row
are four such steps of PEFT, four at once are one of `Together`. Generation: 32 new tokens after prompts of 32, greedy, with a cache; "merged" is one
adapter in the weights, the gate weights four skills per prompt, and so does PEFT's X-LoRA, which runs the model twice for that and refuses to work
with a cache. Search: the losses of 100 skills on 16 examples of 32 tokens, in passes of many skills, or one after another by PEFT's `set_adapter`;
`error` is the largest difference of a loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from torch import Tensor, nn

import skillbank as sb
from benchmarks.timing import paired, run_pinned
from skillbank.kshot import losses_of
from skillbank.mixture import Composed, Mixture
from skillbank.models.transformer import CausalLM
from skillbank.report import markdown
from skillbank.runtime.fused import fuse, lay_out
from skillbank.runtime.plan import carry_out, plan_gated

RESULTS = Path(__file__).parent / "results" / "language.jsonl"
RANK, SKILLS, NEW, MANY = 8, 4, 32, 100
NET = {"model_type": "llama", "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def language() -> CausalLM:
    """The model, with weights as they start."""
    torch.manual_seed(0)
    model = CausalLM(NET, generation={"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0})
    return model.requires_grad_(False).eval()


def skill(net: nn.Module, seed: int) -> sb.Skill:
    """Factors of the size that training gives them."""
    generator = torch.Generator().manual_seed(seed)
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Linear) and "lm_head" not in name}
    return sb.Skill(
        {
            name: (
                torch.randn(RANK, layer.in_features, generator=generator) / layer.in_features**0.5,
                torch.randn(layer.out_features, RANK, generator=generator) * 0.05,
            )
            for name, layer in layers.items()
        }
    )


def rows(count: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Tokens."""
    return {"input_ids": torch.randint(1, 1024, (count, length), generator=torch.Generator().manual_seed(seed))}


def stepping(model: nn.Module, params: list[nn.Parameter], batch: dict[str, Tensor], *, fused: bool) -> Callable[[], None]:
    """One step of an optimiser."""
    optimizer = torch.optim.AdamW(params, lr=1e-3, fused=fused or None)

    def step() -> None:
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peft_step(batch: dict[str, Tensor]) -> Callable[[], None]:
    """PEFT's."""
    model = language()
    net: Any = get_peft_model(model.net, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    return stepping(model, [p for p in net.parameters() if p.requires_grad], batch, fused=False)


def our_step(batch: dict[str, Tensor]) -> Callable[[], None]:
    """What `train.py` runs."""
    model = language()
    params = sb.fresh(model.net, rank=RANK, scale=1.0)
    for p in params:
        p.requires_grad_(True)
    fuse(model.net)
    return stepping(model, params, batch, fused=True)


def at_once(count: int, batch: dict[str, Tensor]) -> Callable[[], None]:
    """So many skills in one pass, each with a batch of its own."""
    together = sb.Together(language(), list(range(count)), ranks=RANK, scales=1.0)
    params = [p for group in together.groups() for p in group["params"]]
    for p in params:
        p.requires_grad_(True)
    return stepping(together, params, {key: value.repeat(count, 1) for key, value in batch.items()}, fused=True)


def base_step(batch: dict[str, Tensor]) -> Callable[[], None]:
    """The base there and back."""
    model = language()
    weight = model.net.get_input_embeddings().weight.requires_grad_(True)

    def step() -> None:
        model(batch).backward()
        weight.grad = None

    return step


def training() -> dict[str, Callable[[], None]]:
    """Ways to train one skill, and four."""
    batch = rows(16, 64)
    one = peft_step(batch)

    def in_a_row() -> None:
        for _ in range(SKILLS):
            one()

    return {
        "base": base_step(batch),
        "PEFT": one,
        "ours": our_step(batch),
        "PEFT, four in a row": in_a_row,
        "ours, four at once": at_once(SKILLS, batch),
    }


def gate() -> sb.MLPGate:
    """Not trained, but not constant."""
    torch.manual_seed(1)
    made = sb.MLPGate(256, SKILLS, hidden=(64,), init="uniform")
    nn.init.normal_(made.head.weight, std=0.5)
    return made.eval()


def generation(count: int) -> dict[str, Callable[[], object]]:
    """Ways to go on from so many prompts."""
    prompts, skills = rows(count, 32), [skill(language().net, k) for k in range(SKILLS)]
    merged = language()
    sb.fold(merged.net, skills[0])
    lay_out(merged.net)
    gated = language()
    mixture = Mixture(gated.net, skills)
    carry_out(plan_gated(gated.net, mixture, repeats=NEW, rows=count), gated.net, mixture)
    lay_out(gated.net)
    composed = Composed(gated, gate(), mixture)
    found: dict[str, Callable[[], object]] = {"merged": lambda: merged.predict(prompts), "ours, gate per prompt": lambda: composed.predict(prompts)}
    crossing = xlora(skills)
    options = {**merged.generation, "use_cache": False, "attention_mask": torch.ones_like(prompts["input_ids"])}
    with torch.no_grad():
        found["PEFT X-LoRA"] = lambda: crossing.generate(input_ids=prompts["input_ids"], **options)
    return found


def xlora(skills: list[sb.Skill]) -> Any:
    """PEFT's model of a gate over the same adapters."""
    import tempfile

    model = language()
    model.net.config.use_cache = False  # it refuses any other
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for k, each in enumerate(skills):
            sb.write_adapter(each, Path(folder) / str(k))
            paths[str(k)] = str(Path(folder) / str(k))
        made = get_peft_model(model.net, XLoraConfig(task_type="CAUSAL_LM", hidden_size=256, xlora_depth=2, xlora_size=64, adapters=paths))
    return made.eval()


def search(count: int) -> tuple[dict[str, Callable[[], object]], float]:
    """Losses of so many skills on 16 examples."""
    model, batch = language(), rows(16, 32)
    skills = [skill(model.net, k) for k in range(count)]
    other = copy.deepcopy(model)
    net: Any = get_peft_model(other.net, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS), adapter_name="0")
    for k, each in enumerate(skills):
        if k:
            net.add_adapter(str(k), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
        for name in each:
            (a, b), layer = each[name], other.net.get_submodule(name)
            with torch.no_grad():
                layer.lora_A[str(k)].weight.copy_(a)
                layer.lora_B[str(k)].weight.copy_(b)

    @torch.no_grad()
    def one_by_one() -> Tensor:
        found = []
        for k in range(count):
            net.set_adapter(str(k))
            found.append(other.losses(batch))
        return torch.stack(found)

    def ours() -> Tensor:
        return losses_of(model, skills, [batch])

    error = float((one_by_one() - ours()).abs().max())
    return {"PEFT, one by one": one_by_one, "ours, batched": ours}, error


def measure(quick: bool, threads: int) -> list[dict[str, Any]]:
    """All rows."""
    rounds, warm = (1, 1) if quick else (7, 1)
    found = []
    ways: dict[str, tuple[dict[str, Callable[[], Any]], dict[str, float]]] = {"training": (dict(training()), {})}
    ways |= {f"generation of {count}": (generation(count), {}) for count in (1, 16)}
    contenders, error = search(10 if quick else MANY)
    ways["search"] = (contenders, {"error": error})
    for part, (each, more) in ways.items():
        for name, timing in paired(each, rounds=rounds if part != "search" else max(rounds // 2, 1), warm=warm).items():
            found.append({"part": part, "method": name, "threads": threads, **timing, **more})
    return found


AGAINST = {"training": "PEFT", "generation of 1": "merged", "generation of 16": "merged", "search": "PEFT, one by one"}
"""What the ratios of a part are to."""


def show(found: list[dict[str, Any]]) -> str:
    """A table per part and number of threads: milliseconds, and how many times as fast as what it is held against."""
    tables = []
    for part, against in AGAINST.items():
        for threads in sorted({row["threads"] for row in found}):
            own = {row["method"]: row for row in found if (row["part"], row["threads"]) == (part, threads)}
            if not own:
                continue
            lines = []
            for name, row in own.items():
                peer = own["PEFT, four in a row" if "four" in name else against]
                line = {part: name, "threads": threads, "ms": f"{1e3 * row['seconds']:.1f} ({1e3 * row['low']:.1f}-{1e3 * row['high']:.1f})"}
                line["times as fast"] = f"{peer['seconds'] / row['seconds']:.2f}"
                lines.append(line | ({"error": f"{row['error']:.1e}"} if "error" in row else {}))
            tables.append(markdown(lines))
    return "\n\n".join(tables)


def main() -> None:
    """Run it."""
    run_pinned(__doc__, "few rounds, ten skills, on one thread; stores nothing", "benchmarks.language", RESULTS, measure, show)


if __name__ == "__main__":
    main()
