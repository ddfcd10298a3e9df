"""One layer under many weighted skills: forward, forward and backward, two of many, and changing a skill; ours beside PEFT's ways to do it.

python -m benchmarks.runtime                    all tables on one and on two threads; stored in benchmarks/results/runtime.jsonl
python -m benchmarks.runtime --quick            few rounds; stores nothing
python -m benchmarks.runtime --from-results     the stored tables

A 512 x 512 linear layer in float32, skills of rank 8, 64 tokens, each with weights of its own. Medians of rounds in which every contender runs
once. "limit" is what no arrangement on these libraries gets below: the base's product and the two of the factors that are used, as plain matrix
products by the faster of torch's two libraries. What the peers compute: `PEFT loop` runs all k adapters, each with weight 1; `PEFT mixed batch` gives
each token one adapter, as `ours, mixed batch` does; Arrow and X-LoRA weight them per token as we do, here without the cost of finding the weights
(for X-LoRA, a second pass of the model).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from peft import ArrowConfig, LoraConfig, XLoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.xlora.layer import XLoraLinearLayer
from torch import Tensor, nn

import skillbank as sb
from benchmarks import stored
from benchmarks.timing import paired
from skillbank.mixture import Mixture
from skillbank.report import markdown
from skillbank.runtime.fused import fuse, lay_out
from skillbank.runtime.products import product

RESULTS = Path(__file__).parent / "results" / "runtime.jsonl"
WIDTH, RANK, TOKENS = 512, 8, 64
Contenders = dict[str, Callable[[], object]]


def base() -> nn.Sequential:
    """The layer, as a net."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH)).requires_grad_(False)


def skill(seed: int) -> sb.Skill:
    """A skill on it."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) / WIDTH**0.5 for shape in ((RANK, WIDTH), (WIDTH, RANK)))
    return sb.Skill({"0": (a, b)})


def slots_of(net: nn.Sequential, count: int) -> sb.Slots:
    """Slots on a net with the skills in them."""
    made = sb.Slots(net, count, rank=RANK)
    for slot in range(count):
        made.put(slot, skill(slot))
    lay_out(net)
    return made


def conf() -> LoraConfig:
    """What PEFT is told of an adapter."""
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], inference_mode=True)


def peft_of(net: nn.Sequential, count: int, prefix: str = "task_") -> Any:
    """PEFT's model with the same skills as adapters."""
    model: Any = get_peft_model(net, conf(), adapter_name=f"{prefix}0")
    for k in range(1, count):
        model.add_adapter(f"{prefix}{k}", conf())
    layer = model.base_model.model[0]
    for k in range(count):
        a, b = skill(k)["0"]
        layer.lora_A[f"{prefix}{k}"].weight.data, layer.lora_B[f"{prefix}{k}"].weight.data = a.clone(), b.clone()
    return model


def products(x: Tensor, count: int) -> Contenders:
    """The limit: the base alone, and with the products of this many ranks."""
    weight, bias = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)
    a, b = torch.randn(WIDTH, count), torch.randn(count, WIDTH)
    return {"base layer": lambda: product(x, weight, bias), "limit": lambda: (product(x, weight, bias), product(product(x, a), b))}


def forward(count: int) -> Contenders:
    """K skills, all of them weighted per token."""
    x, weights = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, count)
    skills = [skill(k) for k in range(count)]
    reference, fused = base(), base()
    mixtures = [Mixture(net, skills) for net in (reference, fused)]
    for mixture in mixtures:
        mixture.cell.mix(weights)
    fuse(fused, mixtures[1])
    lay_out(fused)
    loop = peft_of(base(), count)
    loop.base_model.set_adapter([f"task_{k}" for k in range(count)])
    layer = cast("LoraLayer", loop.base_model.model[0])
    index = torch.arange(TOKENS) % count
    names = [f"task_{k}" for k in index]
    one_each = base()
    slots = slots_of(one_each, count)
    slots.cell.mix(sb.Routes(index[:, None], torch.ones(TOKENS, 1)))
    torch.testing.assert_close(fused(x), reference(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one_each(x), layer(x, adapter_names=names), rtol=1e-4, atol=1e-4)

    def ours() -> Tensor:
        mixtures[1].cell.mix(weights)  # anew, as what is made of weights once serves until the next
        return cast("Tensor", fused(x))

    return products(x, count * RANK) | {
        "ours": ours,
        "ours, reference path": lambda: reference(x),
        "PEFT loop": lambda: layer(x),
        "ours, mixed batch": lambda: one_each(x),
        "PEFT mixed batch": lambda: layer(x, adapter_names=names),
    }


def backward(count: int) -> Contenders:
    """The same, forward and backward, to the weights and to the factors."""
    x, weights = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, count, requires_grad=True)
    skills = [skill(k) for k in range(count)]

    def train(net: nn.Module, wanted: Sequence[Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(net(x).sum(), wanted)

    found: Contenders = {}
    for name in ("ours", "ours, reference path"):
        net = base()
        mixture = Mixture(net, skills)
        mixture.cell.mix(weights)
        if name == "ours":
            fuse(net, mixture)
        factors = [p for key, p in net.named_parameters() if "lora_" in key]
        for p in factors:
            p.requires_grad_(True)
        found[name] = train(net, [weights, *factors])
    loop = peft_of(base(), count)
    loop.base_model.set_adapter([f"task_{k}" for k in range(count)])
    factors = [p for key, p in loop.named_parameters() if "lora_" in key]
    for p in factors:
        p.requires_grad_(True)
    found["PEFT loop"] = train(loop.base_model.model, factors)
    return found


def top_two(slots: int, *, peers: bool) -> Contenders:
    """Two skills of many, other ones for every token."""
    x, k = torch.randn(TOKENS, WIDTH), 2
    dense = torch.randn(TOKENS, slots)
    index = dense.topk(k).indices
    routes = sb.Routes(index, dense.gather(1, index).softmax(-1))
    net = base()
    slots_of(net, slots).cell.mix(routes)
    found: Contenders = products(x, k * RANK) | {"ours": lambda: net(x)}
    if not peers:
        return found
    every = base()
    mixture = Mixture(every, [skill(slot) for slot in range(slots)])
    mixture.cell.mix(routes.dense(slots))
    fuse(every, mixture)
    found["ours, all of them"] = lambda: every(x)
    torch.testing.assert_close(net(x), every(x), rtol=1e-4, atol=1e-4)
    arrow = peft_of(base(), slots)
    router = ArrowConfig(top_k=k)
    router.task_adapter_names, router.gks_adapter_names = [f"task_{slot}" for slot in range(slots)], []
    arrow.add_adapter("arrow_router", LoraConfig(r=RANK, target_modules=["0"], arrow_config=router))
    arrow.set_adapter("arrow_router")
    arrow.eval()
    found["PEFT Arrow"] = lambda: arrow.base_model.model(x)
    names = {str(slot): "" for slot in range(slots)}
    crossed = peft_of(base(), slots, prefix="")
    crossed.base_model.set_adapter(list(names))
    crossing = XLoraConfig(hidden_size=WIDTH, adapters=names, top_k_lora=k, enable_softmax_topk=True)
    layer = XLoraLinearLayer(cast("nn.Module", SimpleNamespace(disabled=False)), crossed.base_model.model[0], lambda: None, 0, crossing)
    scalings = dense.view(1, TOKENS, 1, slots)
    torch.testing.assert_close(layer.forward(x[None], scalings=scalings)[0], net(x), rtol=1e-3, atol=1e-3)
    found["PEFT X-LoRA"] = lambda: layer.forward(x[None], scalings=scalings)
    return found


def change(slots: int) -> Contenders:
    """One skill in the place of another, with this many resident."""
    made = slots_of(base(), slots)
    one, other = skill(slots), skill(slots + 1)
    turn = [0]

    def swap() -> None:
        turn[0] += 1
        made.put(turn[0] % slots, (one, other)[turn[0] % 2])

    found: Contenders = {"ours": swap, "limit": lambda: (one["0"][0].clone(), one["0"][1].clone())}
    if slots <= 64:
        peft = peft_of(base(), slots)
        every = [f"task_{k}" for k in range(slots)]
        found["PEFT set_adapter"] = lambda: peft.base_model.set_adapter(every)

        def replace() -> None:
            peft.delete_adapter("task_1")
            peft.add_adapter("task_1", conf())

        found["PEFT delete_adapter, add_adapter"] = replace
    return found


TABLES: Mapping[str, Callable[[], Contenders]] = {
    **{f"forward, k = {k}": partial(forward, k) for k in (1, 4, 16, 64)},
    **{f"forward and backward, k = {k}": partial(backward, k) for k in (1, 16, 64)},
    "two of 64": partial(top_two, 64, peers=True),
    "two of 1024": partial(top_two, 1024, peers=False),
    "change one of 64": partial(change, 64),
    "change one of 1000": partial(change, 1000),
}


def measure(rounds: int, threads: tuple[int, ...]) -> list[dict[str, Any]]:
    """Rows of all tables."""
    rows = []
    for table, count in [(table, count) for count in threads for table in TABLES]:
        torch.set_num_threads(count)
        with torch.set_grad_enabled("backward" in table):
            times = paired(TABLES[table](), rounds=rounds)
        for who, time in times.items():
            rows.append({"table": table, "threads": count, "who": who, **{key: 1e6 * value for key, value in time.items()}})
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """A table per question and number of threads: microseconds, and in brackets how many times ours."""
    parts = []
    for question, threads in dict.fromkeys((_split(row["table"])[0], row["threads"]) for row in rows):
        chosen = [row for row in rows if _split(row["table"])[0] == question and row["threads"] == threads]
        ours = {row["table"]: row["seconds"] for row in chosen if row["who"] == "ours"}
        lines = []
        for who in dict.fromkeys(row["who"] for row in chosen):
            cells = {row["table"]: f"{row['seconds']:.0f} ({row['seconds'] / ours[row['table']]:.2f})" for row in chosen if row["who"] == who}
            lines.append({"": who} | {_split(table)[1]: cells.get(table, "") for table in ours})
        parts.append(f"{question}, {threads} thread{'s' if threads > 1 else ''}\n\n{markdown(lines)}")
    return "\n\n".join(parts)


def _split(table: str) -> tuple[str, str]:
    """Question and column of a table's name."""
    question, of, column = table.partition(", k = ") if ", k = " in table else table.rpartition(" of ")
    return (question, f"k = {column}") if of.startswith(",") else (f"{question} of many", column)


def main() -> None:
    """Run the command line."""
    options = stored.parser(__doc__, "few rounds").parse_args()
    if options.from_results:
        rows = stored.load(RESULTS)
    else:
        where = stored.where()
        rows = [row | where for row in measure(3 if options.quick else 60, (1,) if options.quick else (1, 2))]
        if not options.quick:
            stored.store(RESULTS, rows)
    print(show(rows))


if __name__ == "__main__":
    main()
