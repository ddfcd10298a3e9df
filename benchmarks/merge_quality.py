"""How good merged models are: skills of a tiny transformer, merged to one that is asked to do all their tasks, ours beside the peers' own merges.

python -m benchmarks.merge_quality                    the table; stored in benchmarks/results/merge_quality.jsonl
python -m benchmarks.merge_quality --quick            one seed, hardly trained, few methods; stores nothing
python -m benchmarks.merge_quality --from-results     the stored table

A GPT-2 of two layers is trained to copy eight symbols of one of four alphabets; from it four LoRA skills (rank 8, every linear layer of the blocks)
to write in a cipher of one alphabet each, a random permutation, half of whose examples copy the others as before. What they know does not contradict,
so that one model could have it all. Score: share of the right symbols in the answers to 512 unseen examples of each of the four ciphers, mean of the
four, in %. Every method gets one weight for all skills, the best of 0.25, 0.5, ..., 1.5 on 256 other examples per cipher; "at its default" is with
the weights and options that it takes when it is told nothing. `learn_weights` and `search_weights` see those 256 examples, `regmean` and `fisher`
their statistics. Mean and range over seeds, each with its own base, ciphers and skills. "PEFT": `add_weighted_adapter`; "fusion_bench": its functions
on the dense deltas, where that package is installed. "joint" is a LoRA of rank 32 trained on the examples of all four ciphers, which merging is meant
to save.
"""

from __future__ import annotations

import contextlib
import copy
import io
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

import skillbank as sb
from benchmarks import stored
from skillbank.merge import METHODS
from skillbank.model import Batch
from skillbank.report import markdown

RESULTS = Path(__file__).parent / "results" / "merge_quality.jsonl"
SYMBOLS, LENGTH, TASKS = 16, 8, 4
SEPARATOR = SYMBOLS * TASKS
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
PEFT: dict[str, dict[str, Any]] = {
    "cat": {"combination_type": "cat"},
    "linear": {"combination_type": "linear"},
    "svd": {"combination_type": "svd", "svd_rank": 32},
    "ties": {"combination_type": "ties", "density": 0.2},
    "ties_svd": {"combination_type": "ties_svd", "density": 0.2, "svd_rank": 32},
    "dare_linear": {"combination_type": "dare_linear", "density": 0.5},
    "dare_ties": {"combination_type": "dare_ties", "density": 0.5},
    "magnitude_prune": {"combination_type": "magnitude_prune", "density": 0.5},
}


class Tiny(nn.Module):
    """A small causal language model that answers what stands behind a separator. A `Model`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=SEPARATOR + 1, n_positions=2 * LENGTH + 1, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        self.net = GPT2LMHeadModel(config)

    def forward(self, batch: Batch) -> Tensor:
        """Cross-entropy of the answers, ()."""
        logits = self.net(batch["tokens"][:, :-1]).logits[:, -LENGTH:]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, -LENGTH:].flatten())

    @torch.no_grad()
    def context(self, batch: Batch) -> Tensor:
        """Embedded tokens (B, T, D)."""
        return self.net.transformer.wte(batch["tokens"])

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Answers (B, 8), each symbol after the right ones before it."""
        return self.net(batch["tokens"][:, :-1]).logits[:, -LENGTH:].argmax(-1)


class Ciphers:
    """A permutation of every alphabet."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.cat([task * SYMBOLS + torch.randperm(SYMBOLS, generator=generator) for task in range(TASKS)])

    def examples(self, task: int, count: int, generator: torch.Generator, *, plain: bool = False) -> Batch:
        """Eight symbols of the task's alphabet, separator, what is to be written: (count, 17)."""
        x = task * SYMBOLS + torch.randint(SYMBOLS, (count, LENGTH), generator=generator)
        return {"tokens": torch.cat([x, torch.full((count, 1), SEPARATOR), x if plain else self.table[x]], dim=1)}

    def stream(self, tasks: Sequence[int], seed: int) -> Callable[[int], Iterator[Batch]]:
        """Endless batches of about 128: the ciphers of some tasks, and as many examples in all of copying the others."""

        def batches(start: int) -> Iterator[Batch]:
            generator = torch.Generator().manual_seed(1000 * seed + start)
            others = [task for task in range(TASKS) if task not in tasks]
            share = 64 if tasks and others else 128
            while True:
                parts = [self.examples(task, share // len(tasks), generator) for task in tasks]
                parts += [self.examples(task, share // len(others), generator, plain=True) for task in others]
                yield {"tokens": torch.cat([part["tokens"] for part in parts])}

        return batches


def score(model: Tiny, held: Mapping[int, Batch]) -> float:
    """Mean share of right symbols over the tasks, in %."""
    return 100 * statistics.mean(float((model.predict(batch) == batch["tokens"][:, -LENGTH:]).float().mean()) for batch in held.values())


def trained(base: Tiny, batches: Callable[[int], Iterator[Batch]], rank: int, seed: int, steps: int) -> sb.Skill:
    """A skill."""
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    params = sb.fresh(model.net, rank=rank, scale=2.0, targets=["c_attn", "c_proj", "c_fc"])
    sb.fit(model, batches, params, steps=steps, lr=1e-3, weight_decay=0.0, ema=None, device="cpu", progress=False)
    return sb.read(model.net)


def with_deltas(base: Tiny, deltas: Any) -> Tiny:
    """The base with deltas in its weights."""
    model = copy.deepcopy(base)
    sb.fold(model.net, deltas)
    return model


class Dense:
    """Dense deltas as `fold` takes them."""

    embeddings: frozenset[str] = frozenset()

    def __init__(self, deltas: Mapping[str, Tensor]) -> None:
        self.deltas = deltas

    def __iter__(self) -> Iterator[str]:
        """Module paths."""
        return iter(self.deltas)

    def __contains__(self, module: object) -> bool:
        """Whether a module changes."""
        return module in self.deltas

    def size(self, module: str) -> tuple[int, tuple[int, ...]]:
        """(O, (I,))."""
        return self.deltas[module].shape[0], (self.deltas[module].shape[1],)

    def delta(self, module: str, least: torch.dtype | None = None) -> Tensor:
        """(O, I)."""
        return self.deltas[module]


def fusion_bench() -> dict[str, Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]]:
    """Functions of that package, none where it is not installed."""
    try:
        from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
        from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
    except ImportError:
        return {}
    return {
        "iso_c": lambda deltas: iso_c(deltas, accelerator="cpu"),
        "iso_cts": lambda deltas: iso_cts(deltas, 0.8, accelerator="cpu"),
        "tsv_m": lambda deltas: compute_and_sum_svd_mem_reduction(deltas, accelerator="cpu"),
    }


def best(
    build: Callable[[float], Tiny], held: Mapping[int, Batch], test: Mapping[int, Batch], scales: tuple[float, ...] = SCALES
) -> dict[str, float]:
    """Test score at the scale that is best on the held-out examples."""
    models = {scale: build(scale) for scale in scales}
    chosen = max(models, key=lambda scale: score(models[scale], held))
    return {"score": score(models[chosen], test), "weight": chosen}


def in_peft(base: Tiny, folder: Path, count: int, options: dict[str, Any]) -> Callable[[float], Tiny]:
    """PEFT's own merge of the skills in a folder."""

    def build(scale: float) -> Tiny:
        model = copy.deepcopy(base)
        net: Any = PeftModel.from_pretrained(model.net, str(folder / "0"), adapter_name="0")
        for k in range(1, count):
            net.load_adapter(str(folder / str(k)), adapter_name=str(k))
        torch.manual_seed(0)
        net.add_weighted_adapter([str(k) for k in range(count)], [scale] * count, "merged", **options)
        net.set_adapter("merged")
        model.net = net.merge_and_unload()
        return model

    return build


def one_seed(seed: int, quick: bool) -> dict[str, dict[str, float]]:
    """Scores by row."""
    base, ciphers = Tiny(seed), Ciphers(seed)
    tasks, steps = range(TASKS), 30 if quick else 300
    sb.fit(base, ciphers.stream((), seed), base.parameters(), steps=3 * steps, lr=2e-3, ema=None, device="cpu", progress=False)
    skills = [trained(base, ciphers.stream([task], 10 * seed + task), 8, 10 * seed + task, steps) for task in tasks]
    generator = torch.Generator().manual_seed(1000 + seed)
    held = {task: ciphers.examples(task, 256, generator) for task in tasks}
    test = {task: ciphers.examples(task, 512, generator) for task in tasks}
    alone = [with_deltas(base, skill) for skill in skills]
    found = {
        "base": {"score": score(base, test)},
        "every skill on its own task": {"score": statistics.mean(score(alone[task], {task: test[task]}) for task in tasks)},
        "one skill on all tasks": {"score": statistics.mean(score(model, test) for model in alone)},
        "joint": {"score": score(with_deltas(base, trained(base, ciphers.stream(tasks, 10 * seed + 9), 32, 10 * seed + 9, 4 * steps)), test)},
    }
    needs: dict[str, dict[str, Any]] = {
        "regmean": {"grams": [sb.input_grams(model, skills[0], [held[task]]) for task, model in enumerate(alone)]},
        "fisher": {"fishers": [sb.fisher_factors(model, skills[0], [held[task]]) for task, model in enumerate(alone)]},
    }
    pairs = {"slerp", "nuslerp", "nearswap", "tall_mask", "subtract_common", "project_out"}  # not of four equals
    for name in ("stack", "ties", "regmean") if quick else [name for name in sorted(METHODS) if name not in pairs]:
        options = needs.get(name, {})

        def build(scale: float, name: str = name, options: dict[str, Any] = options) -> Tiny:
            return with_deltas(base, sb.dense_merge(skills, [scale] * len(skills), name, **options))

        found[name] = best(build, held, test)
        found[name]["default"] = score(with_deltas(base, sb.dense_merge(skills, None, name, **options)), test)
    both: Batch = {"tokens": torch.cat([batch["tokens"] for batch in held.values()])}
    for per_module in (False, True):
        weights, _ = sb.learn_weights(
            copy.deepcopy(base), skills, lambda _: repeat(both), steps=20 if quick else 150, per_module=per_module, device="cpu", progress=False
        )
        found[f"learn_weights{', per module' if per_module else ''}"] = {"score": score(with_deltas(base, sb.merge(skills, weights)), test)}
    searched, _ = sb.search_weights(copy.deepcopy(base), skills, [both], evaluations=5 if quick else 60)
    found["search_weights"] = {"score": score(with_deltas(base, sb.merge(skills, searched)), test)}
    with tempfile.TemporaryDirectory() as folder:
        for k, skill in enumerate(skills):
            sb.write_adapter(skill, Path(folder) / str(k), fan_in_fan_out=True)
        for name, given in PEFT.items():
            if quick and name != "ties":
                continue
            found[f"PEFT {name}"] = best(in_peft(base, Path(folder), len(skills), given), held, test)
    for name, function in {} if quick else fusion_bench().items():

        def made(scale: float, function: Callable[..., Any] = function) -> Tiny:
            deltas = [{module: skill.delta(module) for module in skill} for skill in skills]
            with contextlib.redirect_stdout(io.StringIO()):
                merged = function(deltas)
            return with_deltas(base, Dense({module: scale * delta for module, delta in merged.items()}))

        found[f"fusion_bench {name}"] = best(made, held, test)
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Mean and range over seeds, the best first."""
    names = dict.fromkeys(name for each in results for name in each["scores"])
    rows = []
    for name in names:
        values = [each["scores"][name] for each in results if name in each["scores"]]
        scores = [each["score"] for each in values]
        plain = [each["default"] for each in values if "default" in each]
        weights = sorted({each["weight"] for each in values if "weight" in each})
        rows.append(
            {
                "": name,
                "score": f"{statistics.mean(scores):.1f}",
                "range": f"{min(scores):.1f}-{max(scores):.1f}",
                "best weight": ", ".join(f"{weight:g}" for weight in weights),
                "at its default": f"{statistics.mean(plain):.1f}" if plain else "",
            }
        )
    return markdown(rows[:4] + sorted(rows[4:], key=lambda row: -float(row["score"])))


def main() -> None:
    """Run the command line."""
    parser = stored.parser(__doc__, "one seed, hardly trained, few methods")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    logging.set_verbosity_error()
    if options.from_results:
        results = stored.load(RESULTS)
    else:
        torch.set_num_threads(1)
        where = stored.where()
        results = []
        for seed in range(1 if options.quick else options.seeds):
            results.append({"seed": seed, "scores": one_seed(seed, options.quick), **where})
            if not options.quick:
                stored.store(RESULTS, results)
    print(table(results))


if __name__ == "__main__":
    main()
