"""What only a GPU can show, in one run of a few minutes: kernels checked and measured, layers, the policy and training steps, as CUDA graphs.

python -m benchmarks.gpu                        checks, then all tables; stored in benchmarks/results/gpu.jsonl
python -m benchmarks.gpu --quick                small sizes on whatever device there is, a CPU too; stores nothing
python -m benchmarks.gpu --from-results         the stored tables

Needs torch, triton, peft, transformers, accelerate, safetensors and numpy alone. "limit" is a roofline: the larger of the bytes that have to move
over the bandwidth, and the FLOP over the rate, both as a copy and a matrix product show them on the same device in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import skillbank as sb
from benchmarks import stored
from benchmarks.policy import TINY, WALKER, Net, policy
from benchmarks.training import batch_of, stepping
from skillbank.mixture import Mixture
from skillbank.report import markdown
from skillbank.runtime.compiled import Compiled
from skillbank.runtime.fused import fuse
from skillbank.runtime.plan import carry_out, plan_gated
from skillbank.runtime.routed import _Bags, prepare, routed

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16


def seconds(call: Callable[[], object], *, graph: bool = False, rounds: int = 30) -> float:
    """Median of one call; with `graph`, of its replay as a CUDA graph."""
    for _ in range(3):
        call()
    if DEVICE.type == "cpu":
        return statistics.median(_wall(call) for _ in range(3))
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        call = captured.replay
    taken = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def _wall(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def rates(quick: bool) -> tuple[float, float]:
    """Bytes per second of a copy, and FLOP per second of a large product in bfloat16."""
    size = 2**20 if quick else 2**28
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target, width = torch.empty_like(source), 256 if quick else 8192
    a = torch.randn(width, width, device=DEVICE, dtype=HALF)
    return 2 * size / seconds(lambda: target.copy_(source)), 2 * width**3 / seconds(lambda: a @ a)


def checks() -> list[dict[str, Any]]:
    """The kernels against `embedding_bag`, forward and gradients; on a CPU the two are the same operations."""
    found = []
    for dtype, rank, rows, k, slots in ((torch.float32, 8, 257, 3, 33), (HALF, 16, 64, 2, 1000), (HALF, 64, 5, 1, 4)):
        shapes = ((rows, 512), (slots, rank, 512), (slots, rank, 384), (rows, k))
        x, a, b, weights = (torch.randn(shape, device=DEVICE, dtype=dtype) / shape[-1] ** 0.5 for shape in shapes)
        index = torch.randint(slots, (rows, k), device=DEVICE)
        results = []
        for ops, kind in ((None, dtype), (_Bags(), torch.float32)):
            inputs = [tensor.detach().to(kind).requires_grad_() for tensor in (x, a, b, weights)]
            y = routed(inputs[0], inputs[1], inputs[2], index, inputs[3], prepared=prepare(index, slots, rank, ops=ops))
            results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
        worst = max(float((one.float() - other).norm() / other.norm()) for one, other in zip(*results, strict=True))
        assert worst < (1e-4 if dtype == torch.float32 else 3e-2), f"the kernels are {worst} off in {dtype}"
        found.append({"table": "kernels", "case": f"{str(dtype)[6:]}, rank {rank}, {k} of {slots}", "error": worst})
    return found


def layer(width: int, count: int) -> tuple[nn.Sequential, list[sb.Skill]]:
    """A base of one layer and skills of rank 16 on it."""
    net = nn.Sequential(nn.Linear(width, width)).requires_grad_(False).to(DEVICE, HALF)
    shapes = ((16, width), (width, 16))
    return net, [sb.Skill({"0": cast("Any", tuple(torch.randn(shape) / width**0.5 for shape in shapes))}) for _ in range(count)]


def gated(width: int, counts: Sequence[int], tokens: Sequence[int], bandwidth: float, rate: float) -> list[dict[str, Any]]:
    """Layers under k skills weighted per token, as CUDA graphs, and PEFT's loop."""
    rows = []
    for count in counts:
        net, skills = layer(width, count)
        mixture = Mixture(net, skills)
        fuse(net, mixture)
        peft = get_peft_model(layer(width, 1)[0], LoraConfig(r=16, target_modules=["0"]), adapter_name="0")
        for k in range(1, count):
            peft.add_adapter(str(k), LoraConfig(r=16, target_modules=["0"]))
        cast("Any", peft).base_model.set_adapter([str(k) for k in range(count)])
        peft.to(DEVICE, HALF)
        for number in tokens:
            x = torch.randn(number, width, device=DEVICE, dtype=HALF)
            mixture.cell.mix(torch.randn(number, count, device=DEVICE, dtype=HALF))
            rank = 16 * count
            moved = 2 * (width * width + 2 * rank * width + 2 * number * width)
            limit = max(moved / bandwidth, 2 * number * (width * width + 2 * rank * width) / rate)
            with torch.no_grad():
                ours, loop = seconds(lambda: net(x), graph=True), seconds(lambda: peft.base_model.model(x))  # noqa: B023
            rows.append({"table": "layer", "k": count, "N": number, "limit": limit, "ours": ours, "PEFT loop": loop})
    return rows


def two_of(width: int, slots: int, tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Two of many resident skills, other ones for every token."""
    net, skills = layer(width, 4)
    made = sb.Slots(net, slots, rank=16)
    for slot in range(slots):
        made.put(slot, skills[slot % 4])
    rows = []
    for number in tokens:
        x = torch.randn(number, width, device=DEVICE, dtype=HALF)
        index = torch.rand(number, slots, device=DEVICE).topk(2).indices
        made.cell.mix(sb.Routes(index, torch.rand(number, 2, device=DEVICE, dtype=HALF)))
        base = layer(width, 1)[0]
        with torch.no_grad():
            ours, alone = seconds(lambda: net(x), graph=True), seconds(lambda: base(x), graph=True)  # noqa: B023
        rows.append({"table": "two of many", "slots": slots, "N": number, "base layer": alone, "ours": ours})
    return rows


def acting(net: Net, counts: Sequence[int], samples: int) -> list[dict[str, Any]]:
    """A policy under a gate: one observation, N samples, all denoise steps."""
    rows = []
    for count in counts:
        model = policy(net)
        skills = []
        for _ in range(count):
            sb.fresh(model.net, rank=8, scale=1.0)
            skills.append(sb.read(model.net))
        sb.detach(model.net)
        mixture = Mixture(model.net, skills)
        reference = sb.Composed(model, sb.MLPGate(24, count), mixture).to(DEVICE)
        batch = {"observation": torch.randn(1, 24, device=DEVICE)}
        slow = seconds(lambda: reference.predict(batch, samples=samples))  # noqa: B023
        carry_out(plan_gated(model.net, mixture, repeats=samples * model.steps, passes=model.steps), model.net, mixture)
        fast = Compiled(reference)
        rows.append(
            {
                "table": "policy",
                "K": count,
                "N": samples,
                "reference": slow,
                "compiled": seconds(lambda: fast.predict(batch, samples=samples)),  # noqa: B023
            }
        )
    return rows


def training(net: Net, rows_each: int, at_once: int) -> list[dict[str, Any]]:
    """Steps of one skill and of several at once: forward, backward, AdamW, EMA."""

    def batch(rows: int) -> dict[str, Tensor]:
        return {key: value.to(DEVICE) for key, value in batch_of(rows).items()}

    taken = {}
    for name in ("reference", "ours", "compiled"):
        model = policy(net).to(DEVICE).requires_grad_(False)
        params = sb.fresh(model.net, rank=8)
        for p in params:
            p.requires_grad_(True)
        if name != "reference":
            fuse(model.net)
        taken[name] = seconds(stepping(model, params, batch(rows_each), compiled=name == "compiled"))
    together = sb.Together(policy(net).to(DEVICE), list(range(at_once)))
    taken[f"{at_once} at once"] = seconds(stepping(together, list(together.skills.parameters()), batch(at_once * rows_each)))
    return [{"table": "training", "B": rows_each, **taken}]


def measure(quick: bool) -> list[dict[str, Any]]:
    """Rows of all tables."""
    torch.manual_seed(0)
    net = TINY if quick else WALKER
    bandwidth, rate = rates(quick)
    rows = [{"table": "device", "GB/s": bandwidth / 1e9, "TFLOP/s": rate / 1e12}, *checks()]
    rows += gated(64 if quick else 4096, (2,) if quick else (8, 16, 32, 64), (1, 32) if quick else (1, 32, 256, 4096), bandwidth, rate)
    rows += two_of(64 if quick else 4096, 16 if quick else 1024, (4,) if quick else (1, 32, 256, 4096))
    rows += acting(net, (2,) if quick else (2, 8, 32), 4 if quick else 64)
    rows += [row for each in ((16,) if quick else (256, 2048)) for row in training(net, each, 2 if quick else 8)]
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """The tables; times in microseconds."""
    parts = []
    for table in dict.fromkeys(row["table"] for row in rows):
        chosen = [{key: row[key] for key in row if key not in ("table", "device", "torch", "commit")} for row in rows if row["table"] == table]
        form = "{:.3g}".format if table in ("device", "kernels") else lambda value: f"{1e6 * value:.0f}"
        lines = [{key: form(value) if isinstance(value, float) else str(value) for key, value in row.items()} for row in chosen]
        parts.append(f"{table}\n\n{markdown(lines)}")
    return "\n\n".join(parts)


def main() -> None:
    """Run the command line."""
    options = stored.parser(__doc__, "small sizes on whatever device there is").parse_args()
    if options.from_results:
        rows = stored.load(RESULTS)
    else:
        if DEVICE.type == "cpu" and not options.quick:
            raise SystemExit("torch sees no GPU: --quick checks the script on a CPU")
        where = stored.where()
        where["device"] = torch.cuda.get_device_name() if DEVICE.type == "cuda" else where["device"]
        rows = [row | where for row in measure(options.quick)]
        if not options.quick:
            stored.store(RESULTS, rows)
    print(show(rows))


if __name__ == "__main__":
    main()
