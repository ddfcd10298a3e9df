"""What a merge of two adapters computes, beside what it promises: this library and PEFT, for everything that a LoRA configuration can say.

python -m benchmarks.merge_correctness

The promise is, in every layer, `f(x) + sum_k w_k (f_k(x) - f(x))`, f_k being the layer with adapter k on it, as PEFT computes it. A cell is the
relative distance of what the merged adapter changes from what it should change, or `refused` with the reason below. PEFT's merged adapter is
saved and loaded again before it is looked at, as its users do. Runs in seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import skillbank as sb
from skillbank.report import markdown

CASES: dict[str, list[dict[str, Any]]] = {
    "plain": [{}, {}],
    "alpha differs": [{"lora_alpha": 4}, {"lora_alpha": 32}],
    "ranks differ": [{"r": 4}, {"r": 8}],
    "modules differ": [{"target_modules": ["first"]}, {"target_modules": ["first", "second"]}],
    "rank_pattern": [{"rank_pattern": {"second": 4}}, {"rank_pattern": {"second": 4}}],
    "alpha_pattern": [{"alpha_pattern": {"second": 32}}, {}],
    "rslora": [{"use_rslora": True}, {"use_rslora": True}],
    "one of them rslora": [{"use_rslora": True}, {}],
    "a weight is negative": [{}, {}],
    "DoRA": [{"use_dora": True}, {"use_dora": True}],
    "a bias in LoRA": [{"lora_bias": True}, {"lora_bias": True}],
    "biases of the base": [{"bias": "lora_only"}, {"bias": "lora_only"}],
}
METHODS = ["stack", "svd", "PEFT cat", "PEFT svd", "PEFT linear"]


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (B, 32)."""
        return self.second(self.first(x))


def base() -> Net:
    """The same net every time."""
    torch.manual_seed(0)
    return Net()


def adapted(folder: Path, case: str) -> list[Path]:
    """Two adapters of a case, saved by PEFT."""
    paths = []
    for number, more in enumerate(CASES[case]):
        torch.manual_seed(number + 1)
        options = {"r": 8, "lora_alpha": 16, "target_modules": ["first", "second"], **more}
        model = get_peft_model(base(), LoraConfig(**options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "magnitude" not in name:
                    parameter.normal_(std=0.2)
                elif parameter.requires_grad:
                    parameter.mul_(1.3)
        model.save_pretrained(folder / str(number))
        paths.append(folder / str(number))
    return paths


def change(path: Path | None, x: Tensor) -> Tensor:
    """What an adapter adds to the outputs."""
    net = base()
    with torch.no_grad():
        return (net(x) if path is None else PeftModel.from_pretrained(base(), str(path))(x)) - base()(x)


def by_us(paths: list[Path], weights: list[float], method: str, folder: Path) -> Path:
    """Merge, and write for PEFT."""
    skills = [sb.read_adapter(path) for path in paths]
    options = {"rank": sum(max(skill.ranks.values()) for skill in skills)} if method == "svd" else {}
    sb.write_adapter(sb.merge(skills, weights, method, **options), folder)
    return folder


def by_peft(paths: list[Path], weights: list[float], method: str, folder: Path) -> Path:
    """Merge in PEFT, and save."""
    model: Any = PeftModel.from_pretrained(base(), str(paths[0]), adapter_name="0")
    model.load_adapter(str(paths[1]), adapter_name="1")
    rank = sum(each.r for each in model.peft_config.values())
    options = {"svd_rank": rank} if method == "svd" else {}
    model.add_weighted_adapter(["0", "1"], weights, "merged", combination_type=method, **options)
    model.save_pretrained(str(folder), selected_adapters=["merged"])
    return folder / "merged"


def cell(case: str, name: str, folder: Path) -> tuple[float | None, str]:
    """Relative error, or None and why it was refused."""
    weights = [1.0, -0.5] if case == "a weight is negative" else [0.7, 0.5]
    x = torch.randn(200, 48, generator=torch.Generator().manual_seed(9))
    paths = adapted(folder, case)
    wanted = promised(paths, weights, x)
    merge: Callable[[list[Path], list[float], str, Path], Path] = by_peft if name.startswith("PEFT ") else by_us
    try:
        found = change(merge(paths, weights, name.removeprefix("PEFT "), folder / "merged"), x)
    except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
        return None, str(error).splitlines()[0].replace(str(folder), "...").removesuffix(":")
    return float((found - wanted).norm() / wanted.norm()), ""


def promised(paths: list[Path], weights: list[float], x: Tensor) -> Tensor:
    """What the weighted sum of the adapters' changes of every layer computes, layer by layer in float64."""
    nets = [base().double(), *(PeftModel.from_pretrained(base(), str(path)).double() for path in paths)]
    hidden = x.double()
    with torch.no_grad():
        for name in ("first", "second"):
            plain, *others = [net.get_submodule(name if net is nets[0] else f"base_model.model.{name}")(hidden) for net in nets]
            hidden = plain + torch.stack([w * (other - plain) for w, other in zip(weights, others, strict=True)]).sum(0)
        return (hidden - nets[0](x.double())).float()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows, reasons = [], []
    for case in CASES:
        row: dict[str, Any] = {"": case}
        for name in METHODS:
            with tempfile.TemporaryDirectory() as folder:
                error, reason = cell(case, name, Path(folder))
            row[name] = "refused" if error is None else f"{error:.1e}"
            if reason:
                reasons.append(f"{case}, {name}: {reason}")
        rows.append(row)
    print(markdown(rows), f"PEFT {peft.__version__}, torch {torch.__version__}", *reasons, sep="\n\n")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
