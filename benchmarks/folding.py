"""A skill folded into the weights and taken out again, thousands of times: what is left of the base, ours beside PEFT's merge and unmerge.

python -m benchmarks.folding                    the table; stored in benchmarks/results/folding.jsonl
python -m benchmarks.folding --quick            fewer cycles; stores nothing
python -m benchmarks.folding --from-results     the stored table

Four 256 x 256 layers with a skill of rank 16, 10,000 cycles of `Folding.set` and `Folding.clear`, or of `merge_adapter` and `unmerge_adapter`.
"changed" is the share of the base's weights that are not what they were, to the bit; "drift" the largest difference, over the largest weight. One
thread; the kept copy that makes the difference takes as much memory as the weights that the skill touches.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import skillbank as sb
from benchmarks import stored
from skillbank.report import markdown

RESULTS = Path(__file__).parent / "results" / "folding.jsonl"


def net(dtype: torch.dtype) -> nn.Sequential:
    """The base."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(4))).to(dtype)


def skill(dtype: torch.dtype) -> sb.Skill:
    """A skill on all layers."""
    generator = torch.Generator().manual_seed(1)
    return sb.Skill(
        {
            str(i): (torch.randn(16, 256, generator=generator).to(dtype), (0.01 * torch.randn(256, 16, generator=generator)).to(dtype))
            for i in range(4)
        }
    )


def ours(base: nn.Sequential, part: sb.Skill) -> tuple[Callable[[], None], Callable[[], list[Tensor]]]:
    """One cycle, and the base's weights."""
    folding = sb.Folding(base)

    def cycle() -> None:
        folding.set(part)
        folding.clear()

    return cycle, lambda: [layer.weight for layer in base if isinstance(layer, nn.Linear)]


def peft(base: nn.Sequential, part: sb.Skill) -> tuple[Callable[[], None], Callable[[], list[Tensor]]]:
    """One cycle, and the base's weights."""
    model: Any = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules=[*part]), autocast_adapter_dtype=False)
    layers = [getattr(model.base_model.model, name) for name in part]
    for layer, name in zip(layers, part, strict=True):
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = (half.clone() for half in part[name])

    def cycle() -> None:
        model.merge_adapter()
        model.unmerge_adapter()

    return cycle, lambda: [layer.base_layer.weight for layer in layers]


def row(name: str, dtype: torch.dtype, cycles: int) -> dict[str, Any]:
    """One line of the table."""
    base = net(dtype)
    before = [layer.weight.detach().clone() for layer in base if isinstance(layer, nn.Linear)]
    cycle, weights = (ours if name == "ours" else peft)(copy.deepcopy(base), skill(dtype))
    cycle()
    started = time.perf_counter()
    for _ in range(cycles - 1):
        cycle()
    seconds = time.perf_counter() - started
    pairs = list(zip(before, weights(), strict=True))
    changed = sum(int((one != two).sum()) for one, two in pairs) / sum(one.numel() for one in before)
    drift = max(float((one.double() - two.detach().double()).abs().max()) for one, two in pairs) / max(float(one.abs().max()) for one in before)
    return {
        "who": name,
        "dtype": str(dtype).removeprefix("torch."),
        "cycles": cycles,
        "changed": changed,
        "drift": drift,
        "us": 1e6 * seconds / (cycles - 1),
    }


def main() -> None:
    """Run the command line."""
    parser = stored.parser(__doc__, "fewer cycles")
    options = parser.parse_args()
    if options.from_results:
        rows = stored.load(RESULTS)
    else:
        torch.set_num_threads(1)
        where = stored.where()
        cycles = 50 if options.quick else 10_000
        rows = [row(name, dtype, cycles) | where for dtype in (torch.bfloat16, torch.float32) for name in ("ours", "PEFT")]
        if not options.quick:
            stored.store(RESULTS, rows)
    print(
        markdown(
            [
                {
                    "": each["who"],
                    "dtype": each["dtype"],
                    "cycles": each["cycles"],
                    "changed": f"{each['changed']:.1%}",
                    "drift": f"{each['drift']:.2g}",
                    "us per cycle": f"{each['us']:.0f}",
                }
                for each in rows
            ]
        )
    )


if __name__ == "__main__":
    main()
