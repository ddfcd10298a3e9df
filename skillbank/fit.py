"""The only training loop: a base, a skill and a gate are three sets of parameters of it.

Every step is a pure function of the parameters, the optimiser's state, the seed and the step's number (the random state is set anew from the
last two), so a run that was killed anywhere and is started again gives the same losses as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from tqdm.auto import tqdm

from skillbank.artifacts import wandb_mode
from skillbank.memory import keep_freed_memory
from skillbank.model import SEED_STRIDE, Batch, Batches, evaluating, on
from skillbank.progress import Progress
from skillbank.runtime import sharded
from skillbank.runtime.compiled import compiled_loss

__all__ = ["Fit", "fit", "validation_loss"]


@dataclass(frozen=True)
class Fit:
    """What a training run came to: the rows of its metrics file and how long it took.

    Args:
        rows: one dict per logged step with `step`, `loss` (mean since the row before), `lr`, and `validation` where it was computed.
        steps: optimiser steps in total.
        seconds: wall time, that of the runs which it resumed as well.

    """

    rows: list[dict[str, float]] = field(repr=False)
    steps: int
    seconds: float

    @property
    def loss(self) -> float:
        """Last logged loss."""
        return self.rows[-1]["loss"]


def fit(
    model: nn.Module,
    batches: Batches,
    params: Iterable[nn.Parameter] | Iterable[Mapping[str, Any]],
    *,
    steps: int,
    lr: float = 3e-4,
    weight_decay: float = 1e-4,
    schedule: Literal["cosine", "constant"] = "cosine",
    schedule_steps: int | None = None,
    warmup: int = 0,
    ema: float | None = 0.999,
    clip: float | None = None,
    accumulate: int = 1,
    precision: Literal["no", "bf16", "fp16"] = "no",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    compile: bool = False,
    shard: bool = False,
    seed: int = 0,
    folder: str | Path | None = None,
    checkpoint_every: int = 1000,
    log_every: int = 100,
    validate: Callable[[], float] | None = None,
    validate_every: int = 1000,
    tracker: str | None = None,
    run: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Fit:
    """Train `params` of `model` and nothing else; the EMA of the parameters, if asked for, is what stays in the model.

    AdamW with betas (0.9, 0.999) and one weight decay for all of `params`. The EMA's decay at step n is `min(ema, (1 + n) / (10 + n))`, so that
    a short run is not held back by its start.

    Args:
        model: a `Model`; `forward(batch)` is the loss.
        batches: `batches(i)` yields the batches of index i, i + 1, ... on any device.
        params: the parameters to train, all of them in `model`, or groups of them as torch's optimisers take them: mappings with `params` and, where
            it is another, `lr` or `weight_decay`. All others are frozen for the time of the call, and so are their running statistics.
        steps: optimiser steps, at least 1.
        lr: learning rate after `warmup` linear steps, then falling by a half cosine over `schedule_steps` (default: `steps`), or constant.
        weight_decay: decoupled decay.
        schedule: `cosine` or `constant`.
        schedule_steps: length of the cosine.
        warmup: linear warm-up steps.
        ema: upper bound of the EMA's decay, None for no EMA.
        clip: largest gradient norm, None for no clipping.
        accumulate: batches per optimiser step and process. A run of one process that accumulates two is one of two that accumulate one, and may be
            resumed as such.
        precision: mixed precision of the forward pass.
        device: where to train; `auto` takes a GPU if there is one.
        compile: loss and gradient through `torch.compile`, on a GPU as CUDA graphs: half a minute at the start, then faster steps with the same
            losses to rounding. A run may go on compiled that was not, and the other way round.
        shard: spread the frozen weights of a transformer's blocks over the processes; `skillbank.runtime.sharded.shard` says how. The model
            cannot predict afterwards, what was trained is whole.
        seed: of everything random in the steps.
        folder: where `metrics.jsonl` and the checkpoint go; a run found there is resumed. None keeps nothing.
        checkpoint_every: steps between checkpoints; a run that is stopped in between goes on from the last one.
        log_every: steps per row of the metrics.
        validate: computes a validation loss of the model as it is (called with the EMA in place).
        validate_every: steps between its calls; it is also called at the end.
        tracker: name of an accelerate tracker, for example "wandb"; offline unless one is logged in.
        run: project, name and conf for the tracker.
        progress: show a bar with loss, steps per second and time left.

    Raises:
        ValueError: no steps, no parameters, parameters that are not the model's, a checkpoint of a run with other settings in `folder`, or a GPU that
            is not there.
        FloatingPointError: the loss is not finite; the last checkpoint stands.

    """
    if steps < 1:
        raise ValueError(f"steps={steps} trains nothing: give at least 1")
    groups = _groups(params, lr, weight_decay)
    trained = _named(model, [p for group in groups for p in group["params"]])
    settings: dict[str, Any] = {"steps": steps, "lr": lr, "weight_decay": weight_decay, "schedule": schedule, "schedule_steps": schedule_steps}
    settings |= {"warmup": warmup, "ema": ema, "clip": clip, "accumulate": accumulate, "precision": precision, "seed": seed}
    if len(groups) > 1:
        settings["groups"] = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    accelerator = _accelerator(device, precision, accumulate, tracker)
    settings["accumulate"] = accumulate * accelerator.num_processes
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    with _only_trainable(model, trained), _random_state(), _tracked(accelerator, tracker, run), _restored(model):
        optimizer = torch.optim.AdamW(groups, fused=True)
        backward: Callable[[Tensor], None] = accelerator.backward
        if shard:
            sharded.shard(model, trained.values(), accelerator.device)
            wrapped, optimizer = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True), accelerator.prepare(optimizer)
            backward = partial(sharded.backward, accelerator, trained.values())
        else:
            wrapped, optimizer = accelerator.prepare(model, optimizer)
        loss_of = compiled_loss(wrapped) if compile else wrapped
        state = Progress(model, trained, optimizer.optimizer, ema, settings, Path(folder) if folder else None)
        state.resume()
        still = list(_still(model))
        world, rank = accelerator.num_processes, accelerator.process_index
        stream = islice(batches(state.step * accumulate * world + rank), 0, None, world)
        curves = [_curve(group["lr"], schedule, warmup, schedule_steps or steps) for group in groups]
        bar = tqdm(total=steps, initial=state.step, disable=not (progress and accelerator.is_main_process), desc="fit", unit="step", mininterval=0.5)
        try:
            while state.step < steps:
                for group, curve in zip(optimizer.param_groups, curves, strict=True):
                    group["lr"] = curve(state.step)
                _train(wrapped, still)
                seeds = [(seed * SEED_STRIDE + state.step * 4096 + turn * world + rank) % 2**63 for turn in range(accumulate)]
                state.losses.append(_step(accelerator, wrapped, loss_of, backward, optimizer, stream, seeds, trained.values(), clip))
                state.advance()
                bar.update()
                if state.step % log_every == 0 or state.step == steps:
                    row = _row(accelerator, state, curves[0](state.step - 1))
                    if validate and (state.step % validate_every < log_every or state.step == steps):
                        with state.averaged():
                            row["validation"] = validate()
                    state.log(row, accelerator)
                    bar.set_postfix({key: f"{row[key]:.4f}" for key in ("loss", "validation") if key in row})
                if state.step % checkpoint_every == 0 or state.step == steps:
                    state.save(accelerator)
        finally:
            bar.close()
        state.finish()
    return Fit(state.rows, steps, state.seconds)


@torch.no_grad()
def validation_loss(model: nn.Module, batches: Iterable[Batch], *, seed: int = 0, repeats: int = 4) -> float:
    """Mean loss over held-out batches, each seen `repeats` times with its own noise; the same seed draws the same noise for every model."""
    device = next(model.parameters()).device
    total = rows = 0.0
    with evaluating(model), _random_state():
        torch.manual_seed(seed)
        for batch in batches:
            count = len(next(iter(batch.values())))
            for _ in range(repeats):
                total += float(model(on(device, batch))) * count
                rows += count
    if not rows:
        raise ValueError("there are no held-out batches: set aside some examples (for control tasks: held_out=...)")
    return total / rows


def _step(
    accelerator: Accelerator,
    model: nn.Module,
    loss_of: Callable[[Batch], Tensor],
    backward: Callable[[Tensor], None],
    optimizer: torch.optim.Optimizer,
    stream: Iterator[Batch],
    seeds: Sequence[int],
    params: Iterable[nn.Parameter],
    clip: float | None,
) -> Tensor:
    """One optimiser step on a batch per seed; the mean loss of its batches, detached."""
    total = None
    for seed in seeds:
        torch.manual_seed(seed)
        batch = {key: value.to(accelerator.device, non_blocking=True) for key, value in next(stream).items()}
        with accelerator.accumulate(model):
            loss = loss_of(batch)
            backward(loss)
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(params, clip)
            optimizer.step()
            optimizer.zero_grad()
        total = loss.detach().clone() if total is None else total + loss.detach()  # a copy: a CUDA graph's next replay writes over its output
    assert total is not None
    return total / len(seeds)


def _train(model: nn.Module, still: Iterable[nn.Module]) -> None:
    model.train()
    for module in still:
        module.eval()


def _still(module: nn.Module, frozen: bool = False) -> Iterator[nn.Module]:
    """Modules whose running statistics are frozen: a parameter of theirs is, or of the nearest module around that has any where they have none."""
    params = [p.requires_grad for p in module.parameters()]
    frozen = not all(params) if params else frozen
    if frozen and getattr(module, "running_mean", None) is not None:
        yield module
    for child in module.children():
        yield from _still(child, frozen)


def _row(accelerator: Accelerator, state: Progress, lr: float) -> dict[str, float]:
    loss = accelerator.reduce(torch.stack(state.losses).mean(), "mean")
    return {"step": state.step, "loss": float(loss), "lr": lr}


def _groups(params: Iterable[Any], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters as groups of an optimiser."""
    every = list(params)
    groups = every if every and isinstance(every[0], Mapping) else [{"params": every}]
    return [{"lr": lr, "weight_decay": weight_decay, **group, "params": list(group["params"])} for group in groups]


def _named(model: nn.Module, params: Iterable[nn.Parameter]) -> dict[str, nn.Parameter]:
    wanted = {id(p) for p in params}
    named = {name: p for name, p in model.named_parameters() if id(p) in wanted}
    if not wanted:
        raise ValueError("there are no parameters to train: pass model.parameters(), fresh(net, ...) or gate.parameters()")
    if len(named) != len(wanted):
        raise ValueError(f"{len(wanted) - len(named)} of {len(wanted)} parameters to train are not the model's: attach before you collect them")
    return named


def _accelerator(device: str, precision: str, accumulate: int, tracker: str | None) -> Accelerator:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda was asked for, but torch sees no GPU: use device=auto or device=cpu, or install a CUDA build of torch")
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    return Accelerator(
        cpu=device == "cpu" or not torch.cuda.is_available(),
        mixed_precision=precision,
        gradient_accumulation_steps=accumulate,
        log_with=tracker,
    )


def _curve(lr: float, schedule: str, warmup: int, length: int) -> Callable[[int], float]:
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"unknown schedule {schedule!r}: choose cosine or constant")

    def at(step: int) -> float:
        ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
        return lr * ramp * (0.5 * (1 + math.cos(math.pi * min(step / length, 1.0))) if schedule == "cosine" else 1.0)

    return at


@contextmanager
def _only_trainable(model: nn.Module, trained: dict[str, nn.Parameter]) -> Iterator[None]:
    before = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in before:
        p.requires_grad_(False)
    for p in trained.values():
        p.requires_grad_(True)
    training = model.training
    try:
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)
            p.grad = None
        model.train(training)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Take back what accelerate leaves on a module that it prepares; otherwise a later run would silently keep this one's precision."""
    keys = ("forward", "_original_forward", "_is_accelerate_prepared")
    before = {key: model.__dict__[key] for key in keys if key in model.__dict__}
    try:
        yield
    finally:
        for key in keys:
            model.__dict__.pop(key, None)
        model.__dict__.update(before)


@contextmanager
def _random_state() -> Iterator[None]:
    """Put torch's random state back as it was after the block."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        yield


@contextmanager
def _tracked(accelerator: Accelerator, tracker: str | None, run: Mapping[str, Any] | None) -> Iterator[None]:
    if tracker is None:
        yield
        return
    options = dict(run or {})
    init = {"name": options.pop("name", None)}
    opened = None
    if tracker == "wandb":
        import wandb

        init["mode"], opened = wandb_mode(), wandb.run
    accelerator.init_trackers(options.pop("project", "skillbank"), config=options.pop("conf", None), init_kwargs={tracker: init})
    try:
        yield
    finally:
        if opened is not None:  # a run that was open before goes on
            accelerator.trackers = []
        accelerator.end_training()
