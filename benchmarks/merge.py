"""Merging in factors beside PEFT's merge, a dense SVD and torch.svd_lowrank: time and error, in one process.

python -m benchmarks.merge                    the tables; stored in benchmarks/results/merge.jsonl
python -m benchmarks.merge --quick            small layers; stores nothing
python -m benchmarks.merge --from-results     the stored tables

Best rank-r approximation of the mean of T skills on one d x d layer, in float32: `error` is the distance from the dense float64 sum over the
least possible one, so that 1 is the optimum. All times are up to the factors; ours includes the certificate. "QR" is the time of the
two QR decompositions of the stacked factors alone, the floor of this way to do it. Medians of repeats, peers in turns.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import skillbank as sb
from benchmarks import stored
from skillbank.skill import core

RESULTS = Path(__file__).parent / "results" / "merge.jsonl"
Factor = tuple[torch.Tensor, torch.Tensor]


def skills(count: int, rank: int, width: int) -> list[sb.Skill]:
    """Skills on one square layer, with singular values that fall off."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        a, b = torch.randn(rank, width, generator=generator), torch.randn(width, rank, generator=generator)
        made.append(sb.Skill({"layer": (a, b * torch.logspace(0, -2, rank))}))
    return made


def mean(parts: list[sb.Skill]) -> torch.Tensor:
    """Mean of the dense deltas."""
    return torch.stack([part.delta("layer") for part in parts]).mean(0)


class Layer(nn.Module):
    """One layer that PEFT can adapt."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs of the layer."""
        return self.layer(x)


def in_peft(parts: list[sb.Skill], rank: int, width: int) -> Callable[[], Factor]:
    """PEFT's own svd merge of the same factors."""
    own = len(parts[0]["layer"][0])
    conf = LoraConfig(r=own, lora_alpha=own, target_modules=["layer"])
    model: Any = get_peft_model(Layer(width), conf, adapter_name="0")
    names = [str(k) for k in range(len(parts))]
    for name in names[1:]:
        model.add_adapter(name, conf)
    lora = model.base_model.model.layer
    for name, part in zip(names, parts, strict=True):
        lora.lora_A[name].weight.data, lora.lora_B[name].weight.data = (half.clone() for half in part["layer"])

    def run() -> Factor:
        if "merged" in model.peft_config:
            model.delete_adapter("merged")
        model.add_weighted_adapter(names, [1 / len(names)] * len(names), "merged", combination_type="svd", svd_rank=rank)
        return lora.lora_A["merged"].weight * lora.scaling["merged"], lora.lora_B["merged"].weight

    return run


def row(count: int, rank: int, width: int, repeats: int) -> dict[str, float]:
    """One line of the table."""
    parts = skills(count, rank, width)
    total = torch.stack([part.delta("layer").double() for part in parts]).mean(0)
    values = torch.linalg.svdvals(total if width <= 1024 else core(parts, "layer").cores.mean(0))
    least = float(values[rank:].norm())
    stack = [torch.cat([part["layer"][0] for part in parts]).mT.double(), torch.cat([part["layer"][1] for part in parts], dim=1).double()]

    def dense() -> Factor:
        u, s, vh = torch.linalg.svd(mean(parts), full_matrices=False)
        return vh[:rank], u[:, :rank] * s[:rank]

    def lowrank() -> Factor:
        u, s, v = torch.svd_lowrank(mean(parts), q=rank + 8, niter=2)
        return v[:, :rank].mT, u[:, :rank] * s[:rank]

    def ours() -> Factor:
        return sb.merge(parts, method="svd", rank=rank)["layer"]

    runs: dict[str, Callable[[], Any]] = {
        "ours": ours,
        "PEFT": in_peft(parts, rank, width),
        "dense SVD": dense,
        "svd_lowrank": lowrank,
        "QR": lambda: [torch.linalg.qr(each) for each in stack],
    }
    if width > 1024:  # minutes
        del runs["PEFT"], runs["dense SVD"]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - started))
    found = {f"{name}, ms": statistics.median(each) for name, each in times.items()}
    quality = {}
    for name in ("ours", "PEFT", "svd_lowrank"):
        if name in runs:
            a, b = runs[name]()
            quality[f"{name}, error"] = float(((b.double() @ a.double()) - total).norm()) / least
    return {"T": count, "r": rank, "d": width, **found, **quality}


def main() -> None:
    """Run the command line."""
    parser = stored.parser(__doc__, "small layers")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.from_results:
        rows = stored.load(RESULTS)
    else:
        shapes = [(2, 4, 64)] if options.quick else [(2, 16, 1024), (4, 16, 256), (4, 16, 1024), (4, 16, 4096), (8, 16, 1024), (4, 64, 1024)]
        where = stored.where()
        for threads in options.threads:
            torch.set_num_threads(threads)
            rows += [{"threads": threads, "values": row(*shape, repeats=2 if options.quick else 7), **where} for shape in shapes]
        if not options.quick:
            stored.store(RESULTS, rows)
    print(stored.by_threads(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
