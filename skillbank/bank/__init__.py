"""Versions on disk: put, get, list, resolve, verify. Importing it imports no torch."""

from skillbank.bank.card import BaseLink, Card, Parent
from skillbank.bank.checkpoint import Checkpoint
from skillbank.bank.index import Entry
from skillbank.bank.query import Where
from skillbank.bank.records import Base, Composition, base_fingerprint
from skillbank.bank.refs import Ref, UnknownRef
from skillbank.bank.store import Bank
from skillbank.bank.verify import Problem

__all__ = [
    "Bank",
    "Base",
    "BaseLink",
    "Card",
    "Checkpoint",
    "Composition",
    "Entry",
    "Parent",
    "Problem",
    "Ref",
    "UnknownRef",
    "Where",
    "base_fingerprint",
]
