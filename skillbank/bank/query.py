"""Questions to cards: `metrics.return > 600`, `tags ~ dmc`, `base.ref = walker/stand@1`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from skillbank.bank.card import Card

__all__ = ["Where", "field"]

_FORM = re.compile(r"\s*(?P<field>[\w./-]+)\s*(?P<sign><=|>=|!=|==|=|<|>|~)\s*(?P<value>.*?)\s*")
_SIGNS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "~": lambda found, wanted: str(wanted).lower() in str(found).lower(),
}


@dataclass(frozen=True)
class Where:
    """A condition on one field of a card.

    Args:
        field: path in the card, such as `metrics.return` or `conf.lora.rank`.
        sign: `<`, `<=`, `>`, `>=`, `=` (also `==`), `!=`, or `~`: contains, whatever the case.
        value: a number where it reads as one and is not quoted, otherwise text; `~` looks for text always.

    """

    field: str
    sign: str
    value: float | str

    @classmethod
    def parse(cls, text: str) -> Where:
        """Read `field sign value`.

        Raises:
            ValueError: another form.

        """
        match = _FORM.fullmatch(text)
        if match is None or not match["value"]:
            raise ValueError(f"{text!r} is no condition: give a field, one of {' '.join(_SIGNS)} and a value, such as 'metrics.return > 600'")
        value = match["value"].strip("'\"")
        if match["sign"] == "~" or value != match["value"]:
            return cls(match["field"], match["sign"], value)
        try:
            return cls(match["field"], match["sign"], float(value))
        except ValueError:
            return cls(match["field"], match["sign"], value)

    def __call__(self, card: Card | Mapping[str, Any]) -> bool:
        """Whether a card, or the fields of one, fulfil it; one without the field does not, and neither does one of another type."""
        found = field(card, self.field)
        if found is None:
            return False
        alike = self.sign == "~" or isinstance(found, int | float if isinstance(self.value, float) else str)
        return _SIGNS[self.sign](found, self.value) if alike else self.sign == "!="


def field(card: Card | Mapping[str, Any], path: str) -> Any:
    """Value at a dotted path in a card, None where there is none."""
    value: Any = vars(card) if isinstance(card, Card) else card
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value
