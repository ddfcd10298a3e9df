"""`python -m skillbank.cli`."""

from __future__ import annotations

from skillbank.cli import main

main()
