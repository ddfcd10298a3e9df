"""The command line: `skillbank list | show | log | ...`; one function per command, those that look in `look.py`, those that write in `write.py`."""

from __future__ import annotations

from skillbank.cli import look, write
from skillbank.cli.app import app, check_choices, user_errors

__all__ = ["app", "check_choices", "look", "main", "user_errors", "write"]


@user_errors
def main() -> None:
    """Run the command line."""
    app()
