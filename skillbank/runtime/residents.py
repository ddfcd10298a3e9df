"""Skills by name in a few slots: those that are asked for are fetched, those that were not used for longest make room."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from skillbank.runtime.slots import Slots
from skillbank.skill import Skill

__all__ = ["Residents"]


class Residents:
    """A larger set of skills behind the slots of a net.

    Args:
        slots: nobody else fills them.
        fetch: skill of a name, from where all of them are: a bank, or the host's memory.

    """

    def __init__(self, slots: Slots, fetch: Callable[[str], Skill]) -> None:
        self.slots, self.fetch = slots, fetch
        self.places: dict[str, int] = {}
        """Slot by name, the name that was not used for longest first."""

    def place(self, names: Iterable[str]) -> dict[str, int]:
        """Slots of these skills, all of them resident at once.

        Raises:
            ValueError: more names than slots, or a skill that does not fit into a slot; those that are resident stay.

        """
        wanted = dict.fromkeys(names)
        if len(wanted) > self.slots.count:
            raise ValueError(f"{len(wanted)} skills at once do not go into {self.slots.count} slots: make more slots, or ask for fewer at once")
        for name in wanted:
            if name in self.places:
                self.places[name] = self.places.pop(name)
        for name in wanted:
            if name not in self.places:
                skill = self.fetch(name)
                full = len(self.places) == self.slots.count
                oldest = next(other for other in self.places if other not in wanted) if full else None
                slot = self.places[oldest] if oldest is not None else next(iter(set(range(self.slots.count)) - set(self.places.values())))
                self.slots.put(slot, skill)
                if oldest is not None:
                    del self.places[oldest]
                self.places[name] = slot
        return {name: self.places[name] for name in wanted}
