"""A skill taken away from a language model: its neurons adjusted, its prompts refused, or its delta subtracted; and what that costs.

The first two follow effective skill unlearning (arXiv 2503.21730): a few examples, no training, any causal model of transformers, under skills and a
gate too. Shapes: B batch, L tokens, I neurons of a feed-forward layer, N new tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from skillbank.folding import Folding
from skillbank.merge import merge
from skillbank.model import Batch, Model, ModelModule, Task, evaluating, on
from skillbank.models.transformer import prompt_mask
from skillbank.skill import Skill

__all__ = ["Abstaining", "Adjustment", "forgetting", "negate"]

ACTIVATIONS = r".*\.(act|act_fn|activation_fn|gelu_impl)"
"""Paths of activation functions, which take the pre-activations of a feed-forward layer."""
KEYS = r".*\.(down_proj|mlp\.c_proj|mlp\.fc_out|fc2|dense_4h_to_h)"
"""Paths of second projections, which take its keys: what comes out of the activation."""


class Spread(NamedTuple):
    """Mean and standard deviation of every neuron, (I,) each, float64."""

    mean: Tensor
    deviation: Tensor


class Adjustment(ExitStack):
    """Neurons that tell a skill's inputs from others, moved to where they are on others, until `close` or the end of a block ("Neuron Adjust").

    A neuron's pre-activations, on all tokens that are no padding, are taken for a Gaussian on either set. A value z that is likelier on what is to be
    forgotten becomes `mean_r - std_r (z - mean_f) / std_f`, its mirror image among what is kept, as in the official code of arXiv 2503.21730. That
    draws by the likelihoods whether to; here the same input gives the same output. `forget` and `retain` are the spreads by layer, `neurons` the
    adjusted ones (n,).

    Args:
        model: changed in place; closed, it computes what it did before, to the last bit. Compile it afterwards.
        forget: batches of the skill, packed or not, all of them looked at.
        retain: batches of what is to be kept.
        share: of all neurons that are adjusted, those whose Gaussians are farthest apart (symmetric Kullback-Leibler divergence), in (0, 1].
        modules: regular expression that matches the whole paths of the activation functions in `model.net`.

    Raises:
        ValueError: a share out of range, no batches, no such module, or one that does not run on the batch's tokens.

    """

    def __init__(self, model: Model, forget: Iterable[Batch], retain: Iterable[Batch], *, share: float = 0.05, modules: str = ACTIVATIONS) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise ValueError(f"the share of neurons to adjust must be in (0, 1], got share={share}")
        names = _named(model.net, modules)
        self.forget, self.retain = (_spreads(model, names, map(_every, batches)) for batches in (forget, retain))
        apart = {}
        for name in names:
            (mean_f, std_f), (mean_r, std_r) = self.forget[name], self.retain[name]
            ratio = (std_f / std_r).square()
            apart[name] = ratio + 1 / ratio + (mean_f - mean_r).square() * (std_f**-2 + std_r**-2)  # twice the divergence, and 2
        ranked = torch.cat([each.cpu() for each in apart.values()]).sort(descending=True).values
        least = float(ranked[math.ceil(share * len(ranked)) - 1])
        self.neurons = {name: (each >= least).nonzero()[:, 0] for name, each in apart.items() if (each >= least).any()}
        for name, chosen in self.neurons.items():
            table = torch.stack([part[chosen] for part in (*self.forget[name], *self.retain[name])])
            self.callback(model.net.get_submodule(name).register_forward_pre_hook(partial(_adjusted, chosen, table)).remove)


def _adjusted(neurons: Tensor, table: Tensor, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    (x,) = inputs
    neurons = neurons.to(x.device)
    mean_f, std_f, mean_r, std_r = table.to(x.device, torch.promote_types(x.dtype, torch.float32))
    z = x.index_select(-1, neurons)
    from_f, from_r = (z - mean_f) / std_f, (z - mean_r) / std_r
    likelier = from_r.square() - from_f.square() > 2 * (std_f / std_r).log()
    return (x.index_copy(-1, neurons, torch.where(likelier, mean_r - std_r * from_f, z).to(x.dtype)),)


class Abstaining(nn.Module):
    """A model that does not answer a skill's prompts, told by where they are in its feed-forward layers' key space ("Key Space Detection").

    A layer's key is what its second projection takes, here at the last token of a prompt. What is refused is in the box `mean +- alpha * deviation`
    of the skill's prompts at every neuron of every layer. The official code of arXiv 2503.21730 takes one layer for enough, in a narrower box.
    A `Model`.

    Args:
        model: that answers everything else, left as it is: `model` answers all. Put no gate on top.
        forget: batches of the skill, all of them looked at; where a row has no prompt, as in plain text, its last token counts.
        alpha: half the width of the boxes in standard deviations, > 0; it may be set later, `distance` of prompts of either kind shows to what. None
            for the tightest that hold all of `forget`.
        answer: tokens that are said instead, the rest filled up with the padding token.
        modules: regular expression that matches the whole paths of those projections in `model.net`.

    Raises:
        ValueError: an alpha out of range, fewer than two prompts, packed rows, no such module, or one that does not run on the batch's tokens.

    """

    def __init__(
        self, model: nn.Module, forget: Iterable[Batch], *, alpha: float | None = None, answer: Sequence[int] = (), modules: str = KEYS
    ) -> None:
        super().__init__()
        if alpha is not None and not alpha > 0:
            raise ValueError(f"a box has alpha > 0 standard deviations to either side, got alpha={alpha}: give None for one that holds every prompt")
        self.model, self.answer, looked_at = cast("ModelModule", model), list(answer), list(forget)
        self.boxes = _spreads(self.model, _named(self.net, modules), map(_asked, looked_at), least=2)
        self.alpha = alpha or max(float(self.distance(batch).max()) for batch in looked_at)

    @property
    def net(self) -> nn.Module:
        """Net of the model."""
        return self.model.net

    def distance(self, batch: Batch) -> Tensor:
        """How far every prompt's keys are from the middle of the boxes, (B,) float64, at the farthest neuron of all layers, in its deviations."""
        prompts, last = _asked(batch)
        found: list[Tensor] = []

        def see(name: str, keys: Tensor) -> None:
            mean, deviation = (each.to(keys.device) for each in self.boxes[name])
            found.append(((keys - mean) / deviation).abs().amax(1).to(last.device))

        _see(self.model, list(self.boxes), prompts, last, see)
        return torch.stack(found).amax(0)

    def forward(self, batch: Batch) -> Tensor:
        """Mean loss of the rows, (); where one is refused, that of every token being equally likely."""
        kept = self.distance(batch) > self.alpha
        share, blank = float(kept.double().mean()), math.log(cast("Any", self.net).config.get_text_config().vocab_size)
        if not share:
            return torch.tensor(blank, device=kept.device)
        return self.model(batch if share == 1 else {key: value[kept] for key, value in batch.items()}) * share + blank * (1 - share)

    def context(self, batch: Batch) -> Tensor:
        """Context of the model."""
        return self.model.context(batch)

    @torch.no_grad()
    def predict(self, batch: Batch, **options: Any) -> Tensor:
        """New tokens (B, N) of the model, which takes the options; `answer` where a prompt is refused."""
        said, config = self.model.predict(batch, **options), cast("Any", self.net).generation_config
        end = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        pad = next(token for token in (config.pad_token_id, *end, 0) if token is not None)
        instead = said.new_tensor([*self.answer, *[pad] * said.shape[1]][: said.shape[1]])
        return torch.where((self.distance(batch) <= self.alpha)[:, None], instead, said)


def negate(model: Model, skill: Skill, weight: float = 1.0) -> Folding:
    """Subtract a skill from the weights of its base: negation in task arithmetic (arXiv 2212.04089); `clear`, or the end of a block, undoes it.

    Raises:
        ValueError: a weight that is not positive, or what `fold` raises.

    """
    if not 0 < weight < math.inf:
        raise ValueError(f"a skill is subtracted with a positive weight, got weight={weight}: fold adds one")
    folding = Folding(model.net)
    folding.set(merge([skill], weights=[-weight]))
    return folding


def forgetting(
    model: Model, forget: Task, retain: Task, ways: Mapping[str, Callable[[], Any]], *, examples: int | None = None
) -> list[dict[str, Any]]:
    """Evaluate what is to be forgotten and what is to be kept, before and under each of some ways to forget.

    Args:
        model: the one that `ways` change.
        forget: task of the skill.
        retain: task of what is to be kept.
        ways: name -> what changes the model until the end of a block, such as `lambda: Adjustment(model, some, others)`, or gives another that
            answers instead, such as `lambda: Abstaining(model, some)`.
        examples: of either task, as in `evaluate`; None for all.

    Returns:
        Two rows for every way, `before` first: `way`, `set` ("forget" or "retain"), `task`, and what the task's `evaluate` gives: `exact`, `loss`.

    """
    rows = []
    for way, change in {"before": nullcontext, **ways}.items():
        changed = change()
        block = nullcontext(changed) if isinstance(changed, nn.Module) else cast("AbstractContextManager[Any]", changed)
        with block as given:
            answers = cast("Model", given) if isinstance(given, nn.Module) else model
            for name, task in (("forget", forget), ("retain", retain)):
                rows.append({"way": way, "set": name, "task": task.name, **task.evaluate(answers, episodes=examples)})
    return rows


def _named(net: nn.Module, pattern: str) -> list[str]:
    modules = {name: module for name, module in net.named_modules() if name}
    names = [name for name in modules if re.fullmatch(pattern, name)]
    if not names:
        leaves = sorted({re.sub(r"\d+", "*", name) for name, module in modules.items() if not any(module.children())})
        raise ValueError(f"no module of the net matches modules={pattern!r}: give a pattern of some of {', '.join(leaves[:24])}")
    return names


def _spreads(model: Model, names: Sequence[str], seen: Iterable[tuple[Batch, Tensor]], least: int = 1) -> dict[str, Spread]:
    """Spread of what modules take at the tokens of every batch that its mask holds, in one pass; a deviation is at least what rounding does."""
    sums: dict[str, tuple[int, Tensor, Tensor, float]] = {}

    def see(name: str, x: Tensor) -> None:
        rows = x.double()
        count, mean, squares, _ = sums.get(name, (0, torch.zeros_like(rows[0]), torch.zeros_like(rows[0]), 0.0))
        share, step = len(rows) / (count + len(rows)), rows.mean(0) - mean
        squares = squares + (rows - rows.mean(0)).square().sum(0) + step.square() * (count * share)
        sums[name] = count + len(rows), mean + step * share, squares, torch.finfo(x.dtype).eps

    for batch, mask in seen:
        _see(model, names, batch, mask, see)
    if (found := min(sums[name][0] if name in sums else 0 for name in names)) < least:
        raise ValueError(f"statistics need batches with at least {least} tokens, or prompts, that the modules run on, got {found}")
    spreads = {}
    for name, (count, mean, squares, rounding) in sums.items():
        size = (mean.square() + squares / count).mean().sqrt()
        spreads[name] = Spread(mean, (squares / count).sqrt().clamp(min=float(size) * rounding + 1e-30))
    return spreads


@torch.no_grad()
def _see(model: Model, names: Sequence[str], batch: Batch, mask: Tensor, see: Callable[[str, Tensor], None]) -> None:
    """Run a model on a batch and show `see` what modules take at the tokens of a mask, (tokens, I), in the order of the batch."""
    module = cast("nn.Module", model)
    device = next(module.parameters()).device
    with evaluating(module), ExitStack() as after:
        for name in names:
            after.callback(model.net.get_submodule(name).register_forward_pre_hook(partial(_look, name, mask, see)).remove)
        module(on(device, batch))


def _look(name: str, mask: Tensor, see: Callable[[str, Tensor], None], _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    rows = inputs[0].flatten(0, -2) if inputs else mask.new_empty(0)
    if len(rows) != mask.numel():
        raise ValueError(f"module {name!r} runs on {len(rows)} rows, the batch has tokens {tuple(mask.shape)}: leave it out of the modules")
    if mask.any():
        see(name, rows[mask.to(rows.device).flatten()])


def _every(batch: Batch) -> tuple[Batch, Tensor]:
    """A batch, and which of it are tokens, (B, L)."""
    return batch, prompt_mask({key: value for key, value in batch.items() if key != "labels"})


def _asked(batch: Batch) -> tuple[Batch, Tensor]:
    """Prompts of a batch alone, filled up on the right, and which tokens are their last, (B, L)."""
    if "segments" in batch:
        raise ValueError("packed rows are for training: give every prompt a row of its own")
    prompt = prompt_mask(batch)
    order = (~prompt).long().argsort(dim=1, stable=True)[:, : int(prompt.sum(1).max())]
    mask = prompt.gather(1, order)
    return {"input_ids": batch["input_ids"].gather(1, order), "attention_mask": mask.long()}, mask & ~nn.functional.pad(mask[:, 1:], (0, 1))
