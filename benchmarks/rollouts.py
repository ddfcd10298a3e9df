"""Policy time per environment step: base, one skill, merged and gated, against PEFT's loop over adapters and the limit of the matrix products.

python -m benchmarks.rollouts [--quick] [--json FILE] [--threads 1]

All rows act on the same observations in the same process, in turn, and the median over the repeats is shown; `limit` is what the products of
the base alone take at the speed that a large product reaches here. `error` is the largest difference from the float64 sum of the skills'
deltas added to the weights (temperature 0, same noise).
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

import skillbank as sb
from skillbank.model import Model
from skillbank.models.diffusion import DiffusionPolicy
from skillbank.report import markdown

RANK, DENOISE = 8, 5


def random_skill(net: nn.Module, seed: int) -> sb.Skill:
    """Rank-8 factors of the size that training gives them."""
    generator = torch.Generator().manual_seed(seed)
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Linear)}
    return sb.Skill(
        {
            name: (
                torch.randn(RANK, layer.in_features, generator=generator) / layer.in_features**0.5,
                torch.randn(layer.out_features, RANK, generator=generator) * 0.05,
            )
            for name, layer in layers.items()
        }
    )


def dense(policy: DiffusionPolicy, skills: list[sb.Skill], weights: list[float]) -> DiffusionPolicy:
    """The policy with the weighted deltas added into its weights."""
    merged = copy.deepcopy(policy)
    with torch.no_grad():
        for skill, weight in zip(skills, weights, strict=True):
            for name in skill:
                dense_weight = merged.net.get_submodule(name).get_parameter("weight")
                dense_weight.add_(weight * skill.delta(name))
    return merged


def peft_loop(policy: DiffusionPolicy, skills: list[sb.Skill], weights: list[float], folder: Path) -> DiffusionPolicy:
    """The policy with K active adapters as PEFT runs them, the weights folded into the adapters."""
    looped = copy.deepcopy(policy)
    for k, (skill, weight) in enumerate(zip(skills, weights, strict=True)):
        sb.write_adapter(skill.scaled(weight), folder / f"{k}-{len(skills)}")
    first = PeftModel.from_pretrained(looped.net, folder / f"0-{len(skills)}", adapter_name="0")
    for k in range(1, len(skills)):
        first.load_adapter(folder / f"{k}-{len(skills)}", adapter_name=str(k))
    first.base_model.set_adapter([str(k) for k in range(len(skills))])
    looped.net = first.base_model.model
    return looped


def gemm_rate() -> float:
    """Multiply-adds per second of a 512 x 1024 x 1024 product."""
    a, b = torch.randn(512, 1024), torch.randn(1024, 1024)
    return 512 * 1024 * 1024 / median(lambda: a @ b, 20)


def median(run: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call after three warm-up calls."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def act(model: Model, observation: Tensor) -> Tensor:
    """Predict with the same starting noise every time."""
    torch.manual_seed(0)
    return model.predict({"observation": observation})


def measure(rows: list[int], counts: list[int], repeats: int, folder: Path) -> list[dict[str, Any]]:
    """Result rows for every batch size and number of skills."""
    torch.manual_seed(0)
    policy = DiffusionPolicy(24, 6, temperature=0.0).eval().requires_grad_(False)
    products = sum(layer.weight.numel() for layer in policy.net.modules() if isinstance(layer, nn.Linear))
    results = []
    for count in counts:
        skills = [random_skill(policy.net, seed) for seed in range(count)]
        weights = [1 / count] * count
        stacked = copy.deepcopy(policy)
        sb.attach(stacked.net, sb.merge(skills, weights))
        models: dict[str, Any] = {
            "base": policy,
            "merged into the weights": dense(policy, skills, weights),
            "stack": stacked,
            "gated stack": sb.Composed(copy.deepcopy(policy), sb.MLPGate(24, count, init="uniform"), skills).eval(),
            "PEFT loop": peft_loop(policy, skills, weights, folder),
        }
        oracle = dense(policy.double(), [skill.to(dtype=torch.float64) for skill in skills], weights)
        policy.float()
        for size in rows:
            observation = torch.randn(size, 24)
            truth = act(oracle, observation.double()).float()
            limit = DENOISE * products * size / gemm_rate()
            times: dict[str, list[float]] = {name: [] for name in models}
            with torch.inference_mode():
                for _ in range(5):
                    for name, model in models.items():
                        times[name].append(median(partial(act, model, observation), repeats))
                for name, model in models.items():
                    error = 0.0 if name == "base" else float((act(model, observation) - truth).abs().max())
                    ms = 1e3 * statistics.median(times[name])
                    results.append(
                        {
                            "name": f"K={count}/B={size}/{name}",
                            "ms per decision": round(ms, 3),
                            "low": round(1e3 * min(times[name]), 3),
                            "high": round(1e3 * max(times[name]), 3),
                            "x base": round(statistics.median(times[name]) / statistics.median(times["base"]), 2),
                            "limit": round(1e3 * limit, 3),
                            "us per environment step": round(1e3 * ms / size, 1),
                            "error": f"{error:.0e}",
                        }
                    )
    return results


def main() -> None:
    """Run the command line."""
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size, few repeats")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure([10], [2], 3, Path(folder)) if options.quick else measure([1, 10, 50], [1, 2, 8], 15, Path(folder))
    print(markdown(rows))
    if options.json:
        machine = {"device": platform.processor() or platform.machine(), "threads": options.threads, "torch": torch.__version__}
        options.json.write_text(json.dumps([{**row, **machine} for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
