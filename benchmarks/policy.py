"""One observation, 64 action samples, 5 denoise steps, K skills under a gate: the time to act, ours beside the same formulas in JAX.

python -m benchmarks.policy                     K = 2, 8, 32 and N = 1, 64 on one and two threads; stored in benchmarks/results/policy.jsonl
python -m benchmarks.policy --quick             a tiny net, K = 2 and few rounds, on one thread; stores nothing
python -m benchmarks.policy --from-results      the stored table

The walker's policy (24 observations, 6 actions, 1.64 million weights), skills of rank 8. "reference" is PEFT's layers and a hook; "planned" is what
`load(..., samples=N)` chooses; "compiled" is that with `compile=True`; "merged, compiled" has constant weights. "limit" is the matrix products that
cannot be done without: the base's, and those that merge the skills for the observation, or of their factors, whichever are fewer. Thread counts are
pinned by the affinity of the process, for torch and JAX alike. Actions at temperature 0 agree to 1e-3 first.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import skillbank as sb
from benchmarks.timing import paired, run_pinned
from skillbank.attach import detach
from skillbank.mixture import Mixture
from skillbank.models.diffusion import DiffusionPolicy
from skillbank.report import markdown
from skillbank.runtime.compiled import Compiled
from skillbank.runtime.fused import lay_out
from skillbank.runtime.plan import carry_out, plan_constant, plan_gated
from skillbank.runtime.products import product

RESULTS = Path(__file__).parent / "results" / "policy.jsonl"

Net = Mapping[str, Any]
WALKER: Net = {"dropout": 0.0}
TINY: Net = {"dropout": 0.0, "width": 32, "blocks": 1, "steps": 2}


def policy(net: Net) -> DiffusionPolicy:
    """The walker's, or a tiny one, with weights as they start."""
    torch.manual_seed(0)
    return DiffusionPolicy(24, 6, **net).eval()


def skills(of: Net, count: int) -> list[sb.Skill]:
    """Skills of rank 8 on all of its layers."""
    net, found = policy(of).net, []
    for seed in range(count):
        torch.manual_seed(seed)
        sb.fresh(net, rank=8, scale=1.0)
        start = sb.read(net)
        found.append(sb.Skill({name: (a, 0.05 * torch.randn_like(b)) for name, (a, b) in start.factors.items()}))
        detach(net)
    return found


def gated(net: Net, count: int, samples: int, wanted: Any = None) -> sb.Composed:
    """Base, skills and a gate that tells observations apart."""
    model = policy(net)
    mixture = Mixture(model.net, skills(net, count))
    gate = sb.MLPGate(24, count)
    nn.init.normal_(gate.head.weight, std=0.05)
    carry_out(plan_gated(model.net, mixture, repeats=samples * model.steps, passes=model.steps, wanted=wanted), model.net, mixture)
    if wanted != "reference":
        lay_out(model.net)
    return sb.Composed(model, gate, mixture).eval()


def contenders(net: Net, count: int, samples: int) -> dict[str, Any]:
    """What is timed, by name."""
    observation = torch.randn(1, 24)
    batch = {"observation": observation}
    reference, planned = gated(net, count, samples, "reference"), gated(net, count, samples)
    planned.gate.load_state_dict(reference.gate.state_dict())
    for model in (reference, planned):
        cast("DiffusionPolicy", model.model).temperature = 0.0
    torch.testing.assert_close(planned.predict(batch), reference.predict(batch), rtol=1e-3, atol=1e-3)
    base = policy(net)
    constant = policy(net)
    merged = sb.stack(skills(net, count), [1 / count] * count)
    carry_out(plan_constant(constant.net, merged), constant.net, merged)
    lay_out(constant.net)
    fast, always = Compiled(copy.deepcopy(planned)), Compiled(constant)
    found: dict[str, Any] = {
        "limit": limit(base, count * 8, samples),
        "base, reference": lambda: base.predict(batch, samples=samples),
        "reference": lambda: reference.predict(batch, samples=samples),
        "planned": lambda: planned.predict(batch, samples=samples),
        "compiled": lambda: fast.predict(batch, samples=samples),
        "merged, compiled": lambda: always.predict(batch, samples=samples),
    }
    if importlib.util.find_spec("jax"):
        found["JAX"] = jax_contender(net, count, samples, reference, observation)
    for composed in (reference, planned, cast("sb.Composed", fast.model)):
        cast("DiffusionPolicy", composed.model).temperature = 1.0
    return found


def limit(base: DiffusionPolicy, rank: int, samples: int) -> Any:
    """Products that cannot be done without."""
    weights = [layer.weight.detach().mT.contiguous() for layer in base.net.modules() if isinstance(layer, nn.Linear)]
    shapes = [(torch.randn(samples, len(w)), w, torch.randn(len(w), rank), torch.randn(rank, w.shape[1])) for w in weights]

    def products() -> None:
        for x, w, a, b in shapes:
            merge = samples * base.steps > w.numel() / sum(w.shape)
            if merge:
                product(a, b)
            for _ in range(base.steps):
                product(x, w)
                if not merge:
                    product(product(x, a), b)

    return products


def jax_contender(net: Net, count: int, samples: int, reference: sb.Composed, observation: torch.Tensor) -> Any:
    """The twin, after it has shown that it is one."""
    import jax

    from benchmarks.twin import Twin, check

    model = policy(net)
    model.temperature = 0.0
    twin = Twin(model, skills(net, count))
    apart = check(twin, reference, observation)
    assert apart < 1e-3, f"the twin's actions are {apart} from ours"
    model.temperature = 1.0
    twin = Twin(model, skills(net, count))
    gate, seen = twin.gate(cast("sb.MLPGate", reference.gate)), jax.numpy.asarray(observation.numpy())
    key = jax.random.PRNGKey(0)
    return lambda: twin.act(twin.base, twin.a, twin.b, gate, seen, key, samples=samples).block_until_ready()


def measure(quick: bool, threads: int) -> list[dict[str, Any]]:
    """Rows for this number of threads."""
    net, counts, samples, rounds = (TINY, [2], [64], 3) if quick else (WALKER, [2, 8, 32], [1, 64], 40)
    rows = []
    for count in counts:
        for number in samples:
            with torch.no_grad():
                times = paired(contenders(net, count, number), rounds=rounds)
            for who, time in times.items():
                rows.append({"K": count, "N": number, "threads": threads, "who": who} | {key: 1e3 * value for key, value in time.items()})
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """Milliseconds, and in brackets how many times faster than the reference path."""
    lines = []
    for key in dict.fromkeys((row["threads"], row["N"], row["K"]) for row in rows):
        chosen = {row["who"]: row["seconds"] for row in rows if (row["threads"], row["N"], row["K"]) == key}
        line = {"threads": key[0], "N": key[1], "K": key[2]}
        lines.append(line | {who: f"{value:.2f} ({chosen['reference'] / value:.1f})" for who, value in chosen.items()})
    return markdown(lines)


def main() -> None:
    """Run the command line."""
    run_pinned(__doc__, "a tiny net, K = 2 and few rounds", "benchmarks.policy", RESULTS, measure, show)


if __name__ == "__main__":
    main()
