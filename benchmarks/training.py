"""A training step of a skill on the walker's policy, and eight skills at once; ours beside PEFT and the same formulas in JAX.

python -m benchmarks.training                   256 and 2048 examples, on one and two threads; stored in benchmarks/results/training.jsonl
python -m benchmarks.training --quick           few rounds of a tiny net, one skill, on one thread; stores nothing
python -m benchmarks.training --from-results    the stored tables

A step is the noise-prediction loss, its gradient, AdamW and the EMA, for factors of rank 8 on all ten linear layers (70,432 of 1.7 million
parameters), in float32, without dropout. "PEFT" is `get_peft_model` on the same network of torch's own modules, with torch's AdamW; "reference" is
our model on PEFT's layers, "ours" what `train.py` runs, "compiled" what it runs with `fit.compile=true`. "limit" is the products with the frozen
weights alone, once forward and once back. Of eight at once, every one has its 256 examples, seed and optimiser state; its losses are those of a run
of its own (tests/test_together.py).
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import skillbank as sb
from benchmarks.policy import TINY, WALKER, Net, policy
from benchmarks.timing import paired, run_pinned
from skillbank.models.diffusion import Mish
from skillbank.report import markdown
from skillbank.runtime.compiled import compiled_loss
from skillbank.runtime.fused import fuse
from skillbank.runtime.products import product

RESULTS = Path(__file__).parent / "results" / "training.jsonl"
RANK, SCALE, LR, DECAY = 8, 16.0, 1e-3, 1e-4
AT_ONCE = 8


def batch_of(rows: int) -> dict[str, Tensor]:
    """Examples."""
    return {"observation": torch.randn(rows, 24), "action": torch.rand(rows, 1, 6) * 2 - 1}


def stepping(
    model: nn.Module, params: Sequence[nn.Parameter], batch: dict[str, Tensor], *, fused: bool = True, compiled: bool = False
) -> Callable[[], None]:
    """One step as `fit` takes it."""
    model.train()
    loss_of = compiled_loss(model) if compiled else model
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, fused=fused or None)
    shadow, average = [p.detach().clone() for p in params], get_ema_multi_avg_fn(0.999)

    def step() -> None:
        loss_of(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        average(shadow, [p.detach() for p in params], 1)

    return step


def peft(net: Net, batch: dict[str, Tensor]) -> Callable[[], None]:
    """The same with PEFT's model and torch's own modules."""
    model = policy(net)
    for name, module in list(model.net.named_modules()):
        if isinstance(module, Mish):
            parent, _, child = name.rpartition(".")
            setattr(model.net.get_submodule(parent), child, nn.Mish())
    targets = [name for name, module in model.net.named_modules() if isinstance(module, nn.Linear)]
    adapted: Any = get_peft_model(model.net, LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=targets))
    return stepping(model, [p for p in adapted.parameters() if p.requires_grad], batch, fused=False)


def ours(net: Net, batch: dict[str, Tensor], *, fast: bool = True, compiled: bool = False) -> Callable[[], None]:
    """Our own."""
    model = policy(net).requires_grad_(False)
    params = sb.fresh(model.net, rank=RANK, scale=SCALE)
    for p in params:
        p.requires_grad_(True)
    if fast:
        fuse(model.net)
    return stepping(model, params, batch, compiled=compiled)


def limit(net: Net, rows: int) -> Callable[[], None]:
    """Products with the frozen weights, forward and back; only the last 128 inputs of `enter` need a gradient, those of the first layer none."""
    layers = {name: layer.weight.detach() for name, layer in policy(net).net.named_modules() if isinstance(layer, nn.Linear)}
    inputs = {name: torch.randn(rows, weight.shape[1]) for name, weight in layers.items()}
    outputs = {name: torch.randn(rows, weight.shape[0]) for name, weight in layers.items()}

    def products() -> None:
        for name, weight in layers.items():
            product(inputs[name], weight.mT)
            if name != "time.1":
                product(outputs[name], weight[:, -128:].contiguous() if name == "enter" else weight)

    return products


def in_jax(net: Net, batch: dict[str, Tensor]) -> Callable[[], None]:
    """The twin's step."""
    import jax

    from benchmarks.twin import Twin

    model = policy(net)
    sb.fresh(model.net, rank=RANK, scale=1.0)
    start = sb.read(model.net)
    twin = Twin(policy(net), [start])
    state, key = twin.state(SCALE), jax.random.PRNGKey(0)
    observation, action = (jax.numpy.asarray(batch[name].flatten(1).numpy()) for name in ("observation", "action"))
    held: list[Any] = [state, key]

    def step() -> None:
        held[1], own = jax.random.split(held[1])
        held[0], value = twin.step(twin.base, held[0], observation, action, own)
        value.block_until_ready()

    return step


def one_skill(net: Net, rows: int) -> dict[str, Callable[[], None]]:
    """Ways to train one skill."""
    batch = batch_of(rows)
    found = {"limit": limit(net, rows), "PEFT": peft(net, batch), "reference": ours(net, batch, fast=False), "ours": ours(net, batch)}
    found["compiled"] = ours(net, batch, compiled=True)
    if importlib.util.find_spec("jax"):
        found["JAX"] = in_jax(net, batch)
    return found


def eight_skills(net: Net, rows: int) -> dict[str, Callable[[], None]]:
    """Ways to train eight."""
    at_once = {}
    joined = {key: torch.cat([batch_of(rows)[key] for _ in range(AT_ONCE)]) for key in ("observation", "action")}
    for name in ("ours", "compiled"):
        together = sb.Together(policy(net), list(range(AT_ONCE)), ranks=RANK, scales=SCALE)
        at_once[name] = stepping(together, list(together.skills.parameters()), joined, compiled=name == "compiled")
    batch = batch_of(rows)
    runs = {"PEFT, one by one": [peft(net, batch) for _ in range(AT_ONCE)], "ours, one by one": [ours(net, batch) for _ in range(AT_ONCE)]}
    in_a_row: dict[str, Callable[[], None]] = {name: (lambda steps=steps: [step() for step in steps]) for name, steps in runs.items()}  # type: ignore[misc]
    return {"limit": limit(net, AT_ONCE * rows), **at_once, **in_a_row}


def measure(quick: bool, threads: int) -> list[dict[str, Any]]:
    """Rows for this number of threads."""
    net = TINY if quick else WALKER
    tables: dict[str, Callable[[], dict[str, Callable[[], None]]]] = {
        "one skill, 256 examples": partial(one_skill, net, 256),
        "one skill, 2048 examples": partial(one_skill, net, 2048),
        "eight skills, 256 examples each": partial(eight_skills, net, 256),
    }
    rows = []
    for table, make in list(tables.items())[: 1 if quick else None]:
        with warnings.catch_warnings(action="ignore"):
            times = paired(make(), rounds=3 if quick else 30 if table == "one skill, 256 examples" else 12)
        for who, time in times.items():
            rows.append({"table": table, "threads": threads, "who": who} | {key: 1e3 * value for key, value in time.items()})
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """Milliseconds, and how many times PEFT's step takes as long."""
    parts = []
    for table in dict.fromkeys(row["table"] for row in rows):
        lines = []
        for threads in dict.fromkeys(row["threads"] for row in rows):
            chosen = {row["who"]: row["seconds"] for row in rows if (row["table"], row["threads"]) == (table, threads)}
            peer = next(value for who, value in chosen.items() if who.startswith("PEFT"))
            lines.append({"threads": threads} | {who: f"{value:.1f} ({peer / value:.2f})" for who, value in chosen.items()})
        parts.append(f"{table}\n\n{markdown(lines)}")
    return "\n\n".join(parts)


def main() -> None:
    """Run the command line."""
    run_pinned(__doc__, "few rounds of a tiny net, one skill", "benchmarks.training", RESULTS, measure, show)


if __name__ == "__main__":
    main()
