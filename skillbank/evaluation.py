"""How versions of a bank do: on the task that they, or others, were made on, or on examples, in all and by kind of example."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from skillbank.bank import Bank, Ref
from skillbank.load import load
from skillbank.model import Task
from skillbank.recipe import task_of
from skillbank.tasks.records import read_records
from skillbank.tasks.text import TextTask

__all__ = ["evaluate", "run_harness"]


def evaluate(
    refs: Sequence[str | Ref],
    bank: Bank,
    *,
    task: str | Ref | None = None,
    examples: str | Path | None = None,
    by: str | None = None,
    episodes: int | None = None,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Evaluate versions.

    Args:
        refs: bases, skills, compositions.
        bank: where they are.
        task: the version whose task they are evaluated on; None is each one's own.
        examples: file of records instead, see `read_records`, for language models.
        by: a key of the records: a row for each of its values as well.
        episodes: episodes, or records, of an evaluation; None is what the task says.
        device: where they run.

    Returns:
        Rows `{"ref", "task", metric: value, ...}`; with `by`, each group's with that key.

    Raises:
        UnknownRef: no such version.
        FileNotFoundError: no such file of examples.
        ValueError: a task and examples; a version without a task; `by` and a task that has no records, or records without that key.

    """
    if task is not None and examples is not None:
        raise ValueError(f"evaluate on a task or on examples, got task={str(task)!r} and examples={str(examples)!r}")
    records, given = None if examples is None else read_records(examples), None if task is None else task_of(task, bank)
    rows = []
    for ref in refs:
        exact = str(bank.resolve(ref))
        if records is None:
            judge = given or task_of(exact, bank)
        else:
            judge = TextTask(name=Path(cast("str", examples)).stem, data=records, tokenizer=exact, bank=bank, test=records)
        model = load(exact, bank, device)
        groups = {"": judge} if by is None else {"": judge, **_groups(judge, by)}
        for group, part in groups.items():
            named = {} if by is None else {by: group or "all"}
            rows.append({"ref": exact, "task": judge.name, **named, **part.evaluate(model, episodes=episodes)})
    return rows


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


def _groups(judge: Task, by: str) -> dict[str, TextTask]:
    if not isinstance(judge, TextTask):
        raise ValueError(f"task {judge.name!r} has no records to group by {by!r}: leave by out")
    return judge.by(by)
