"""Models that skills attach to."""
