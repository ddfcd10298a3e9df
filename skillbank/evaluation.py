"""How versions of a bank do: on the task that they, or others, were made on, or on examples, in all and by kind; and what forgetting one costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from skillbank.bank import Bank, Ref
from skillbank.kshot import text_batches
from skillbank.levels import LEVELS, compose_at
from skillbank.load import load, skills_on_base
from skillbank.model import Task
from skillbank.recipe import task_of
from skillbank.skill import Skill
from skillbank.tasks.records import Record, read_records
from skillbank.tasks.text import TextTask
from skillbank.unlearn import Abstaining, Adjustment, forgetting, negate
from skillbank.words import did_you_mean

__all__ = ["evaluate", "forget", "run_harness"]


def evaluate(
    refs: Sequence[str | Ref],
    bank: Bank,
    *,
    task: str | Ref | None = None,
    examples: str | Path | None = None,
    by: str | None = None,
    levels: Sequence[str] = (),
    large: str | Ref | None = None,
    episodes: int | None = None,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Evaluate versions, or skills together at some levels of composition.

    Args:
        refs: bases, skills, compositions.
        bank: where they are.
        task: the version whose task they are evaluated on; None is each one's own.
        examples: file of records instead, see `read_records`, for language models.
        by: a key of the records: a row for each of its values as well.
        levels: compose `refs`, skills of one base, at each of these instead, with equal weights; see `compose_at`. In the prompt, their cards speak
            for them.
        large: the base that level `emulated` moves.
        episodes: episodes, or records, of an evaluation; None is what the task says.
        device: where they run.

    Returns:
        Rows `{"ref", "task", metric: value, ...}`; with `by`, each group's with that key; with levels, `level`.

    Raises:
        UnknownRef: no such version.
        FileNotFoundError: no such file of examples.
        ValueError: a task and examples; a version without a task; `by` and a task that has no records, or records without that key.

    """
    if task is not None and examples is not None:
        raise ValueError(f"evaluate on a task or on examples, got task={str(task)!r} and examples={str(examples)!r}")
    if unknown := next((level for level in levels if level not in LEVELS), None):
        raise ValueError(f"unknown level {unknown!r}: {did_you_mean(unknown, LEVELS)}")
    records, given = None if examples is None else read_records(examples), None if task is None else task_of(task, bank)
    exact = [str(bank.resolve(ref)) for ref in refs]
    rows = []
    for ref, level in [(ref, "") for ref in exact] if not levels else [(exact[0], level) for level in levels]:
        judge = given or task_of(ref, bank) if records is None else _judge(str(examples), records, ref, bank)
        model = _at(level, exact, bank, large, device) if level else load(ref, bank, device)
        named = {"ref": " ".join(exact), "level": level} if level else {"ref": ref}
        for group, part in ({"": judge} if by is None else {"": judge, **_groups(judge, by)}).items():
            kind = {} if by is None else {by: group or "all"}
            rows.append({**named, "task": judge.name, **kind, **part.evaluate(model, episodes=episodes)})
    return rows


def forget(
    ref: str | Ref,
    bank: Bank,
    examples: str | Path,
    retain: str | Path,
    *,
    ways: Sequence[str] = ("adjust", "abstain"),
    skill: str | Ref | None = None,
    share: float = 0.05,
    alpha: float | None = None,
    weight: float = 1.0,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Evaluate a language model before and after a skill is taken from it, on what is to be forgotten and what is to be kept.

    Args:
        ref: base, skill or composition.
        bank: where it is; nothing is put into it.
        examples: file of records of the skill; `adjust` and `abstain` look at them, and they are evaluated.
        retain: file of records of what is to be kept, used likewise.
        ways: `adjust`, an `Adjustment`; `abstain`, an `Abstaining`; `negate`, a skill subtracted.
        skill: what is subtracted; None is `ref`.
        share: of neurons, for `adjust`.
        alpha: for `abstain`.
        weight: for `negate`.
        device: where it runs.

    Returns:
        Two rows for every way, as `forgetting`.

    Raises:
        UnknownRef: no such version.
        FileNotFoundError: no such file of records.
        ValueError: an unknown way, nothing to subtract, or as `Adjustment`, `Abstaining` and `negate`.

    """
    exact = str(bank.resolve(ref))
    subtracted = bank.get(skill or ref) if "negate" in ways else None
    if "negate" in ways and not isinstance(subtracted, Skill):
        raise ValueError(f"{str(skill or ref)!r} is no skill that could be subtracted: give one as skill")
    model = load(exact, bank, device)
    known: Mapping[str, Callable[[], Any]] = {
        "adjust": lambda: Adjustment(model, text_batches(examples, exact, bank), text_batches(retain, exact, bank), share=share),
        "abstain": lambda: Abstaining(model, text_batches(examples, exact, bank), alpha=alpha),
        "negate": lambda: negate(model, cast("Skill", subtracted), weight),
    }
    if unknown := next((way for way in ways if way not in known), None):
        raise ValueError(f"unknown way to forget {unknown!r}: {did_you_mean(unknown, known)}")
    gone, kept = (_judge(file, read_records(file), exact, bank) for file in (examples, retain))
    return forgetting(model, gone, kept, {way: known[way] for way in ways})


def run_harness(
    refs: Sequence[str | Ref],
    bank: Bank,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include: str | Path | None = None,
    batch_size: int = 8,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Evaluate language models of a bank with the lm-evaluation-harness, through its interface to transformers; under their gate, if they have one.

    Args:
        refs: bases, skills, compositions.
        bank: where they are.
        tasks: names that the harness knows.
        limit: take the first this many documents of a task.
        include: folder of further tasks, as the harness describes them.
        batch_size: requests at once; one at a time under a gate.
        device: where they run.

    Returns:
        Rows `{"ref", "task", metric: value, ...}`.

    Raises:
        ImportError: the harness is not installed.
        UnknownRef: no such version.
        ValueError: a version that is no language model, or has no tokenizer.

    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ImportError("the lm-evaluation-harness is not installed: pip install 'skillbank[harness]'") from None
    manager, rows = TaskManager(include_path=None if include is None else str(include)), []
    for ref in refs:
        exact = str(bank.resolve(ref))
        model: Any = load(exact, bank, device)
        inner = getattr(model, "model", model)
        if (tokenizer := getattr(inner, "tokenizer", None)) is None:
            raise ValueError(f"{exact!r} is a {type(inner).__name__} without a tokenizer: the harness evaluates language models")
        gated = hasattr(model, "live")  # the harness fills rows up without a mask, and a gate would look at that
        lm = HFLM(pretrained=inner.net, tokenizer=tokenizer, batch_size=1 if gated else batch_size, device=device)
        with model.live() if gated else nullcontext():
            found = simple_evaluate(lm, tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=0)
        for task, metrics in found["results"].items():
            numbers = {key.partition(",")[0]: value for key, value in metrics.items() if isinstance(value, float) and "stderr" not in key}
            rows.append({"ref": exact, "task": task, **numbers})
    return rows


def _judge(file: str | Path, records: Sequence[Record], ref: str, bank: Bank) -> TextTask:
    return TextTask(name=Path(file).stem, data=records, tokenizer=ref, bank=bank, test=records)


def _at(level: str, refs: Sequence[str], bank: Bank, large: str | Ref | None, device: str) -> Any:
    """Skills together at a level."""
    _, model, skills, exact = skills_on_base(bank, refs)
    options: dict[str, Any] = {}
    if level == "in_context":
        options["cards"] = [bank.card(ref) for ref in exact]
    if level == "emulated" and large is not None:
        options["large"] = load(str(large), bank, device)
    return compose_at(level, model.to(device), skills, **options)


def _groups(judge: Task, by: str) -> dict[str, TextTask]:
    if not isinstance(judge, TextTask):
        raise ValueError(f"task {judge.name!r} has no records to group by {by!r}: leave by out")
    return judge.by(by)
