"""Every number that the README claims, one module each: `python -m benchmarks.NAME`."""
