"""How versions of a bank do: on the task that they, or others, were made on, or on examples, in all and by kind of example."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skillbank.bank import Bank, Ref
from skillbank.load import load
from skillbank.model import Task
from skillbank.recipe import task_of
from skillbank.tasks.text import TextTask

__all__ = ["evaluate"]


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
    rows = []
    for ref in refs:
        exact = str(bank.resolve(ref))
        judge = (
            task_of(task or exact, bank)
            if examples is None
            else TextTask(name=Path(examples).stem, data=examples, tokenizer=exact, bank=bank, test=examples)
        )
        model = load(exact, bank, device)
        groups = {"": judge} if by is None else {"": judge, **_groups(judge, by)}
        for group, part in groups.items():
            named = {} if by is None else {by: group or "all"}
            rows.append({"ref": exact, "task": judge.name, **named, **part.evaluate(model, episodes=episodes)})
    return rows


def _groups(judge: Task, by: str) -> dict[str, TextTask]:
    if not isinstance(judge, TextTask):
        raise ValueError(f"task {judge.name!r} has no records to group by {by!r}: leave by out")
    return judge.by(by)
