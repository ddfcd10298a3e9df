"""Skills of a language model: training, several skills in one batch, generation under a gate, and the search of a bank; ours beside PEFT.

python -m benchmarks.language                   on one and two threads; stored in benchmarks/results/language.jsonl
python -m benchmarks.language --quick           few rounds of a tiny net, on one thread; stores nothing
python -m benchmarks.language --from-results    the stored tables

A Llama of 6 blocks, 256 wide (5.5 million parameters), and for generation another of 4 blocks, 1024 wide (51 million), from random weights, in
float32; factors of rank 8 on all linear layers of the blocks. "limit" is the products with the frozen weights alone: in training there and back.
Training: batches of 16 rows of 64 tokens, loss, gradient and AdamW; "compiled" as `fit.compile=true` does it. Four in a row are four such steps of
PEFT, four at once are one of `Together`. Generation: 32 new tokens after prompts of 32, greedy, with a cache; "merged" is one adapter in the
weights, the gate weights four skills per prompt, and so does PEFT's X-LoRA, which runs the model twice for that and refuses to work with a cache (it
is left out where it would take minutes). Search: the losses of 100 skills on 16 examples of 32 tokens, in passes of many skills, or one after
another by PEFT's `set_adapter`; `error` is the largest difference of a loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from skillbank.runtime.compiled import compiled_loss
from skillbank.runtime.fused import fuse, lay_out
from skillbank.runtime.plan import carry_out, plan_gated
from skillbank.runtime.products import product

RESULTS = Path(__file__).parent / "results" / "language.jsonl"
RANK, SKILLS, MANY = 8, 4, 100
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Size:
    """Of a model, and how many tokens it generates."""

    width: int
    blocks: int
    heads: int
    new: int = 32


TINY, SMALL, WIDE = Size(32, 1, 2, 4), Size(256, 6, 4), Size(1024, 4, 16)


def language(size: Size) -> CausalLM:
    """The model, with weights as they start."""
    torch.manual_seed(0)
    net: dict[str, Any] = {"model_type": "llama", "vocab_size": 1024, "hidden_size": size.width, "intermediate_size": 3 * size.width}
    net |= {"num_hidden_layers": size.blocks, "num_attention_heads": size.heads}
    model = CausalLM(net, generation={"max_new_tokens": size.new, "min_new_tokens": size.new, "do_sample": False, "pad_token_id": 0})
    return model.requires_grad_(False).eval()


def linear_layers(net: nn.Module) -> dict[str, nn.Linear]:
    """Those of the blocks."""
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Linear) and "lm_head" not in name}


def skill(net: nn.Module, seed: int) -> sb.Skill:
    """Factors of the size that training gives them."""
    generator = torch.Generator().manual_seed(seed)
    return sb.Skill(
        {
            name: (
                torch.randn(RANK, layer.in_features, generator=generator) / layer.in_features**0.5,
                torch.randn(layer.out_features, RANK, generator=generator) * 0.05,
            )
            for name, layer in linear_layers(net).items()
        }
    )


def limit(passes: Sequence[int], size: Size, *, back: bool = False) -> Callable[[], None]:
    """Products with the frozen weights in passes of so many rows each, there or there and back."""
    net = language(size).net
    lay_out(net)
    weights = [layer.weight.detach() for layer in linear_layers(net).values()]
    inputs = {(count, width): torch.randn(count, width) for count in set(passes) for weight in weights for width in weight.shape}

    @torch.no_grad()
    def products() -> None:
        for count in passes:
            for weight in weights:
                out, width = weight.shape
                product(inputs[count, width], weight.mT)
                if back:
                    product(inputs[count, out], weight)

    return products


def rows(count: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Tokens."""
    return {"input_ids": torch.randint(1, 1024, (count, length), generator=torch.Generator().manual_seed(seed))}


def stepping(model: nn.Module, params: list[nn.Parameter], batch: dict[str, Tensor], *, fused: bool, compiled: bool = False) -> Callable[[], None]:
    """One step of an optimiser."""
    loss_of = compiled_loss(model) if compiled else model
    optimizer = torch.optim.AdamW(params, lr=1e-3, fused=fused or None)

    def step() -> None:
        loss_of(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peft_step(size: Size, batch: dict[str, Tensor]) -> Callable[[], None]:
    """PEFT's."""
    model = language(size)
    net: Any = get_peft_model(model.net, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    return stepping(model, [p for p in net.parameters() if p.requires_grad], batch, fused=False)


def our_step(size: Size, batch: dict[str, Tensor], *, compiled: bool = False) -> Callable[[], None]:
    """What `train.py` runs."""
    model = language(size)
    params = sb.fresh(model.net, rank=RANK, scale=1.0)
    for p in params:
        p.requires_grad_(True)
    fuse(model.net)
    return stepping(model, params, batch, fused=True, compiled=compiled)


def at_once(size: Size, count: int, batch: dict[str, Tensor], *, compiled: bool = False) -> Callable[[], None]:
    """So many skills in one pass, each with a batch of its own."""
    together = sb.Together(language(size), list(range(count)), ranks=RANK, scales=1.0)
    params = [p for group in together.groups() for p in group["params"]]
    for p in params:
        p.requires_grad_(True)
    return stepping(together, params, {key: value.repeat(count, 1) for key, value in batch.items()}, fused=True, compiled=compiled)


def training(size: Size) -> dict[str, Callable[[], None]]:
    """Ways to train one skill, and four."""
    batch = rows(16, 64)
    one = peft_step(size, batch)

    def in_a_row() -> None:
        for _ in range(SKILLS):
            one()

    tokens = batch["input_ids"].numel()
    return {
        "limit": limit([tokens], size, back=True),
        "PEFT": one,
        "ours": our_step(size, batch),
        "ours, compiled": our_step(size, batch, compiled=True),
        "limit of four": limit([SKILLS * tokens], size, back=True),
        "PEFT, four in a row": in_a_row,
        "ours, four at once": at_once(size, SKILLS, batch),
        "ours, four at once, compiled": at_once(size, SKILLS, batch, compiled=True),
    }


def gate(width: int) -> sb.MLPGate:
    """Not trained, but not constant."""
    torch.manual_seed(1)
    made = sb.MLPGate(width, SKILLS, hidden=(64,), init="uniform")
    nn.init.normal_(made.head.weight, std=0.5)
    return made.eval()


def generation(count: int, size: Size) -> dict[str, Callable[[], object]]:
    """Ways to go on from so many prompts."""
    prompts, skills = rows(count, 32), [skill(language(size).net, k) for k in range(SKILLS)]
    merged = language(size)
    sb.fold(merged.net, skills[0])
    lay_out(merged.net)
    gated = language(size)
    mixture = Mixture(gated.net, skills)
    carry_out(plan_gated(gated.net, mixture, repeats=size.new, passes=size.new), gated.net, mixture)
    lay_out(gated.net)
    composed = Composed(gated, gate(size.width), mixture)
    return {
        "limit": limit([32 * count, *[count] * (size.new - 1)], size),
        "merged": lambda: merged.predict(prompts),
        "ours, gate per prompt": lambda: composed.predict(prompts),
    }


def crossing(count: int, size: Size) -> dict[str, Callable[[], object]]:
    """The same with X-LoRA."""
    prompts, net = rows(count, 32)["input_ids"], xlora(size)
    options = {**language(size).generation, "use_cache": False, "attention_mask": torch.ones_like(prompts)}
    return {"PEFT X-LoRA": lambda: net.generate(input_ids=prompts, **options)}


def xlora(size: Size) -> Any:
    """PEFT's model of a gate over the same adapters."""
    import tempfile

    model = language(size)
    skills = [skill(model.net, k) for k in range(SKILLS)]
    model.net.config.use_cache = False  # it refuses any other
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for k, each in enumerate(skills):
            sb.write_adapter(each, Path(folder) / str(k))
            paths[str(k)] = str(Path(folder) / str(k))
        made = get_peft_model(model.net, XLoraConfig(task_type="CAUSAL_LM", hidden_size=size.width, xlora_depth=2, xlora_size=64, adapters=paths))
    return made.eval()


def search(size: Size, count: int) -> tuple[dict[str, Callable[[], object]], float]:
    """Losses of so many skills on 16 examples."""
    model, batch = language(size), rows(16, 32)
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
    return {"limit": limit([count * batch["input_ids"].numel()], size), "PEFT, one by one": one_by_one, "ours, batched": ours}, error


def measure(quick: bool, threads: int) -> list[dict[str, Any]]:
    """All rows."""
    rounds, warm = (1, 1) if quick else (7, 1)
    found = []

    def keep(part: str, contenders: dict[str, Callable[[], Any]], rounds: int, **more: float) -> None:
        for name, timing in paired(contenders, rounds=rounds, warm=warm).items():
            found.append({"part": part, "method": name, "threads": threads, **timing, **more})

    small = TINY if quick else SMALL
    keep("training", dict(training(small)), rounds)
    for size in [small] if quick else [SMALL, WIDE]:
        for count in (1, 16):
            part = f"generation of {count}, {size.width} wide"
            keep(part, generation(count, size), rounds)
            if size is not WIDE or count == 1:
                keep(part, crossing(count, size), 1 if quick else 2)
    contenders, error = search(small, 10 if quick else MANY)
    keep("search", contenders, 1 if quick else 3, error=error)
    return found


AGAINST = {
    "training": "PEFT",
    **{f"generation of {count}, {width} wide": "merged" for width in (TINY.width, 256, 1024) for count in (1, 16)},
    "search": "PEFT, one by one",
}
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
    run_pinned(__doc__, "few rounds of a tiny net, ten skills, on one thread; stores nothing", "benchmarks.language", RESULTS, measure, show)


if __name__ == "__main__":
    main()
